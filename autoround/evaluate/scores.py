"""Perplexity and KL divergence of models in memory over the same tokens.

Legend: N rows, B rows in a batch, T tokens in a row, P predicted tokens, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autoround.backends.products import float32_products


class TokenScores(NamedTuple):
    """One number per predicted token (P of them), in reading order.

    Attributes:
        nll_P: float64, negative log likelihood of the true token, in nats.
        kl_P: float64, KL divergence from the reference's distribution to this model's, in nats.
        agrees_P: bool, whether both rank the same token first.
    """

    nll_P: Tensor
    kl_P: Tensor
    agrees_P: Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood."""
        return math.exp(float(self.nll_P.mean()))

    @property
    def perplexity_error(self) -> float:
        """Standard error of ``perplexity``, to first order."""
        return self.perplexity * float(self.nll_P.std() / len(self.nll_P) ** 0.5)

    @property
    def kl(self) -> float:
        """Mean KL divergence per token, in nats."""
        return float(self.kl_P.mean())

    @property
    def kl_error(self) -> float:
        """Standard error of ``kl``."""
        return float(self.kl_P.std() / len(self.kl_P) ** 0.5)

    @property
    def top1(self) -> float:
        """Share of tokens on which both rank the same token first."""
        return float(self.agrees_P.double().mean())

    @property
    def top1_error(self) -> float:
        """Standard error of ``top1``."""
        return float(self.agrees_P.double().std() / len(self.agrees_P) ** 0.5)


def compare(
    reference: nn.Module,
    candidates: Mapping[str, nn.Module],
    tokens_NT: Tensor,
    *,
    batch_size: int = 4,
    reference_name: str = "float",
) -> dict[str, TokenScores]:
    """Score candidates against a reference, all on the same tokens.

    Args:
        reference: a causal language model of transformers, in any float dtype.
        candidates: name -> model with the same vocabulary.
        tokens_NT: int64 (N, T), T >= 2; each row is scored on its own.
        batch_size: rows in a forward.
        reference_name: name of the reference's own scores in the result.

    Returns:
        name -> scores over the N * (T - 1) predicted tokens; log-probabilities are taken in float32.
    """
    found: dict[str, list[TokenScores]] = {name: [] for name in (reference_name, *candidates)}
    for tokens_BT in torch.split(tokens_NT, batch_size):
        next_P = tokens_BT[:, 1:].flatten()
        expected_PV = _log_probabilities(reference, tokens_BT)
        found[reference_name].append(score(expected_PV, expected_PV, next_P))
        for name, model in candidates.items():
            found[name].append(score(expected_PV, _log_probabilities(model, tokens_BT), next_P))
    return {name: join(parts) for name, parts in found.items()}


def score(expected_PV: Tensor, log_PV: Tensor, next_P: Tensor) -> TokenScores:
    """Score predictions.

    Args:
        expected_PV: the reference's log-probabilities.
        log_PV: the model's log-probabilities.
        next_P: int64, the tokens that came.

    >>> even = torch.full((1, 2), 0.5).log()
    >>> round(score(even, even, torch.tensor([1])).perplexity, 6)
    2.0
    """
    kl_P = (expected_PV.exp() * (expected_PV - log_PV)).sum(-1)
    return TokenScores(
        -log_PV.gather(-1, next_P[:, None])[:, 0].double(), kl_P.double(), expected_PV.argmax(-1) == log_PV.argmax(-1)
    )


def join(parts: Sequence[TokenScores]) -> TokenScores:
    """Scores of successive tokens as one."""
    return TokenScores(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _log_probabilities(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """Of every next token, one row for each predicted one."""
    device, *others = dict.fromkeys(parameter.device for parameter in model.parameters())
    with torch.inference_mode(), nullcontext() if others else float32_products(device):
        logits_BTV: Tensor = model(input_ids=tokens_BT.to(device), use_cache=False).logits[:, :-1]
        return logits_BTV.flatten(0, 1).float().log_softmax(-1).cpu()
