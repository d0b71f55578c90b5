"""What to do with experts that few tokens reach: error of a block's output on other tokens, by policy.

A Qwen 3 MoE block with random weights, whose inputs have a common part, so that routers prefer some experts, is tuned
with each policy of ``--starved_experts``, and once with steps for all experts, whatever they took. Told are the mean
squares of the output's error over all tokens held out, and over those that a starved expert takes, both divided by that
of ``rtn``; means over seeds.

``python -m benchmarks.starved [--bits N] [--iters N] [--rows N] [--seeds N] [--skew X]``

Legend: B rows, T tokens, D hidden size, K experts that a token takes, E experts.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from autoround import tuner
from autoround.coverage import STARVED_TOKENS
from autoround.engine import quantize
from autoround.recipe import Recipe
from benchmarks import machine
from tests.engine.mixtures import replaced

VOCABULARY, SEQLEN, HELD_OUT = 2048, 64, 128
POLICIES = {"rtn": STARVED_TOKENS, "route_all": STARVED_TOKENS, "steps for all": 0}
"""Name -> tokens below which an expert is starved."""


def make_model(seed: int, skew: float) -> PreTrainedModel:
    """A model of one block, 32 experts of which a token takes 4."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=128, moe_intermediate_size=64, num_experts=32, num_experts_per_tok=4,
        norm_topk_prob=True, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=64,
        initializer_range=0.1, tie_word_embeddings=False)  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        weight: Tensor = model.get_input_embeddings().weight
        weight.normal_().add_(skew * torch.randn(weight.shape[1]))
    return model


def tokens(seed: int, rows: int) -> Tensor:
    """Random ids."""
    return torch.randint(0, VOCABULARY, (rows, SEQLEN), generator=torch.Generator().manual_seed(seed))


def outputs(model: PreTrainedModel, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """What the block returns, (B * T, D), and the experts that its tokens take, (B * T, K)."""
    seen: dict[str, Any] = {}
    block = model.get_submodule("model.layers.0")
    hooks = [
        block.register_forward_hook(lambda module, args, out: seen.update(out=out)),
        block.get_submodule("mlp.experts").register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(choice=(*args, *kwargs.values())[1]), with_kwargs=True
        ),
    ]
    with torch.no_grad():
        model(tokens_BT)
    for hook in hooks:
        hook.remove()
    out = seen["out"]
    return (out if isinstance(out, Tensor) else out[0]).flatten(0, 1), seen["choice"].flatten(0, -2)


def errors(options: argparse.Namespace, seed: int, policy: str) -> tuple[float, float, float]:
    """Error over all tokens held out, over those of starved experts, and the share of experts that are starved."""
    model, rows_BT, other_BT = make_model(seed, options.skew), tokens(1, options.rows), tokens(2, HELD_OUT)
    wanted_ND, choice_NK = outputs(model, other_BT)
    starved_E = outputs(model, rows_BT)[1].flatten().bincount(minlength=32) < STARVED_TOKENS
    with tempfile.TemporaryDirectory() as folder, patch.object(tuner, "STARVED_TOKENS", POLICIES[policy]):
        recipe = Recipe(
            bits=options.bits, group_size=32, dataset=rows_BT.tolist(), nsamples=options.rows, seqlen=SEQLEN,
            batch_size=8, iters=options.iters, torch_compile=False, device_map="cpu", format=("auto_round",),
            starved_experts="route_all" if policy == "route_all" else "rtn", output_dir=str(Path(folder) / "out"),
        )  # fmt: skip
        run = quantize(model, recipe)
        for _ in run:
            pass
        found_ND, _ = outputs(replaced(make_model(seed, options.skew), run), other_BT)
    error_N = (found_ND - wanted_ND).square().mean(-1)
    return float(error_N.mean()), float(error_N[starved_E[choice_NK].any(-1)].mean()), float(starved_E.float().mean())


def run() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("bits", 2), ("iters", 200), ("rows", 64), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--skew", type=float, default=0.5, help="of the part that all inputs have in common")
    options = parser.parse_args()
    print(machine.describe(), flush=True)
    found = {policy: [errors(options, seed, policy) for seed in range(options.seeds)] for policy in POLICIES}
    share = statistics.mean(each[2] for each in found["rtn"])
    print(
        f"{options.bits} bits, {options.iters} steps, {options.rows} x {SEQLEN} tokens, {share:.0%} of experts starved"
    )
    for policy, own in found.items():
        every, starved = (
            statistics.mean(one[place] / base[place] for one, base in zip(own, found["rtn"], strict=True))
            for place in (0, 1)
        )
        print(f"{policy:14} {every:.3f} of all tokens, {starved:.3f} of those of starved experts", flush=True)


if __name__ == "__main__":
    run()
