"""Twenty steps on one block follow the losses that auto-round 0.16.1 recorded (tests/golden/record_auto_round.py)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from autoround import func as F

GOLDEN = Path(__file__).parents[1] / "golden"
RECORD = json.loads((GOLDEN / "auto_round_0_16_1.json").read_text())
CASES = {name: case for name, case in RECORD["cases"].items() if not case["masked"]}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_codes_follow_the_record(name: str) -> None:
    case: dict[str, Any] = CASES[name]
    tensors = load_file(GOLDEN / "llama_block.safetensors")
    cos, sin = tensors.pop("inputs.cos"), tensors.pop("inputs.sin")
    hidden_NTD, target_NTD, _ = (tensors.pop(key) for key in ("inputs.hidden_states", "targets", "token_mask"))
    with torch.device("meta"):
        block = LlamaDecoderLayer(LlamaConfig(**RECORD["config"], attn_implementation="sdpa"), layer_idx=0)
    spec = F.QuantSpec(
        bits=case["bits"], group_size=case["group_size"], sym=case["sym"], scale_dtype=case["scale_dtype"]
    )
    specs = dict.fromkeys(F.linear_paths(block), spec)
    weights, optimizer = F.split_tensors(tensors, specs), F.signsgd(F.linear_decay(case["lr"], case["iters"]))
    step = F.make_step(F.make_block_fn(block), specs, optimizer)

    def batch(rows: list[int]) -> F.Batch:
        call = F.Call((hidden_NTD[rows],), {"position_embeddings": (cos, sin), "attention_mask": None})
        return F.Batch(call, target_NTD[rows], torch.ones(len(rows), hidden_NTD.shape[1], dtype=torch.bool))

    state = F.init_state(F.init_params(weights.tuned), optimizer)
    result = F.tune_block(step, weights, state, [batch(rows) for rows in case["batches"]])
    torch.testing.assert_close(result.losses_K, torch.tensor(case["losses"]), rtol=1e-3, atol=0)
    theirs = load_file(GOLDEN / "auto_round_codes.safetensors")
    for path in specs:
        ours_OI = F.fake_quantize(weights.tuned[path], result.params[path], spec)
        flips = ((ours_OI - theirs[f"{name}/{path}/qdq_weight"]).abs() > 1e-6).float().mean()
        assert float(flips) < 0.01, path
