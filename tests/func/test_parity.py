"""Twenty steps on one block follow auto-round 0.16.1, as recorded by tests/golden/record_auto_round.py.

With float16 scales the two differ on purpose: there, gradients of the clips pass through float16, here they stay
float32.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from autoround import func as F
from autoround.func.step import Step

GOLDEN = Path(__file__).parents[1] / "golden"
RECORD = json.loads((GOLDEN / "auto_round_0_16_1.json").read_text())
CASES: dict[str, dict[str, Any]] = RECORD["cases"]


class Setup:
    """The recorded block and data under the settings of one case."""

    def __init__(self, case: dict[str, Any]) -> None:
        tensors = load_file(GOLDEN / "llama_block.safetensors")
        self.tables = tensors.pop("inputs.cos"), tensors.pop("inputs.sin")
        self.hidden_NTD, self.target_NTD = tensors.pop("inputs.hidden_states"), tensors.pop("targets")
        token_mask = tensors.pop("token_mask").bool()
        self.valid_NT = token_mask if case["masked"] else torch.ones_like(token_mask)
        with torch.device("meta"):
            block = LlamaDecoderLayer(LlamaConfig(**RECORD["config"], attn_implementation="sdpa"), layer_idx=0)
        self.spec = F.QuantSpec(
            bits=case["bits"], group_size=case["group_size"], sym=case["sym"], scale_dtype=case["scale_dtype"]
        )
        self.specs = dict.fromkeys(F.linear_paths(block), self.spec)
        self.weights = F.split_tensors(tensors, self.specs)
        self.optimizer = F.signsgd(F.linear_decay(case["lr"], case["iters"]))
        self.step: Step = F.make_step(F.make_block_fn(block), self.specs, self.optimizer, project=project_clips)
        self.batches = [self.batch(rows) for rows in case["batches"]]

    def batch(self, rows: list[int]) -> F.Batch:
        call = F.Call((self.hidden_NTD[rows],), {"position_embeddings": self.tables, "attention_mask": None})
        return F.Batch(call, self.target_NTD[rows], self.valid_NT[rows])

    def tune(self) -> F.TuneResult:
        state = F.init_state(F.init_params(self.weights.tuned), self.optimizer)
        return F.tune_block(self.step, self.weights, state, self.batches)

    def losses_over_all_tokens(self, losses_K: torch.Tensor) -> torch.Tensor:
        """The record divides by all tokens, padding included."""
        return losses_K * torch.stack([batch.valid_BT.float().mean() for batch in self.batches])


def project_clips(params: F.Params, specs: Mapping[str, F.WeightSpec]) -> F.Params:
    """The recorded run holds clips in their range but lets offsets pass 0.5 by up to the sum of its learning rates."""
    projected = F.project(params, specs)
    return {path: projected[path]._replace(offset_OGS=own.offset_OGS) for path, own in params.items()}


@pytest.mark.parametrize("name", [name for name in CASES if "fp32" in name])
def test_losses_and_codes_follow_the_record(name: str) -> None:
    case, setup = CASES[name], Setup(CASES[name])
    result = setup.tune()
    ours_K = setup.losses_over_all_tokens(result.losses_K)
    torch.testing.assert_close(ours_K, torch.tensor(case["losses"]), rtol=1e-3, atol=0)
    theirs = load_file(GOLDEN / "auto_round_codes.safetensors")
    for path in setup.specs:
        codes = F.quantize(setup.weights.tuned[path], result.params[path], setup.spec)
        flips = (codes.q_OI != theirs[f"{name}/{path}/codes"]).float().mean()
        assert float(flips) < 0.005, path


@pytest.mark.parametrize("name", CASES)
def test_round_to_nearest_loses_what_the_record_loses(name: str) -> None:
    case, setup = CASES[name], Setup(CASES[name])
    state = F.init_state(F.init_params(setup.weights.tuned), setup.optimizer)
    _, loss = setup.step(setup.weights, state, setup.batches[0])
    first = setup.losses_over_all_tokens(loss.repeat(len(setup.batches)))[0]
    assert float(first) == pytest.approx(case["losses"][0], rel=1e-5)
