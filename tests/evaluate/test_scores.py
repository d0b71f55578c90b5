"""Scores of tiny models against values computed by hand."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from autoround.evaluate import compare

VOCABULARY = 4


class Constant(nn.Module):
    """Predicts the same distribution everywhere."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits_V = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, input_ids: Tensor, use_cache: bool) -> CausalLMOutput:
        return CausalLMOutput(logits=self.logits_V.expand(*input_ids.shape, VOCABULARY))


def test_scores_equal_their_definitions() -> None:
    sure, even = [0.7, 0.1, 0.1, 0.1], [0.25] * VOCABULARY
    tokens_NT = torch.tensor([[3, 0, 1], [0, 0, 0]])
    scores = compare(Constant(sure), {"even": Constant(even)}, tokens_NT)
    assert scores["float"].kl == 0
    assert scores["float"].top1 == 1
    assert scores["float"].perplexity == pytest.approx(math.exp(-(3 * math.log(0.7) + math.log(0.1)) / 4))
    assert scores["even"].kl == pytest.approx(sum(p * math.log(p / 0.25) for p in sure), rel=1e-5)
    assert scores["even"].perplexity == pytest.approx(4)
    assert scores["even"].nll_P.shape == (4,)
    assert scores["even"].kl_error == pytest.approx(0, abs=1e-7)
