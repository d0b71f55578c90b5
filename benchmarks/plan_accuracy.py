"""What ``auto-round plan`` foretells, beside what a run then takes: peak memory, sizes of files, and time.

For each of five models, as whole processes with cold compile caches: the plan, then the same command without it. Run
``python -m benchmarks.plan_accuracy`` on an idle machine: on a busy one, memory and sizes mean something, time nothing.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from autoround.data.python_docs import python_docs
from benchmarks import machine
from benchmarks.cost import measure
from benchmarks.small_llama import train_tokenizer

VOCABULARY, TEXTS = 4096, 4000
_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}


def llama(hidden: int, blocks: int) -> PreTrainedModel:
    """A random Llama with heads of 64."""
    return LlamaForCausalLM(LlamaConfig(
        **_IDS, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128))  # fmt: skip


def mixture() -> PreTrainedModel:
    """A random Qwen3 with 8 experts, 2 of which take a token."""
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(
        **_IDS, hidden_size=256, intermediate_size=512, moe_intermediate_size=256, num_experts=8, head_dim=64,
        num_experts_per_tok=2, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))  # fmt: skip


def gpt2() -> PreTrainedModel:
    """A random GPT-2, whose head is its embedding."""
    return GPT2LMHeadModel(GPT2Config(**_IDS, n_embd=512, n_layer=6, n_head=8, n_positions=1024))


class Case(NamedTuple):
    """A model, and the words of the command beside those of all runs."""

    make: Callable[[], PreTrainedModel]
    words: tuple[str, ...] = ()


CASES = {
    "llama-12x256": Case(partial(llama, 256, 12)),
    "llama-2x1536": Case(partial(llama, 1536, 2)),
    "gpt2-6x512-head": Case(gpt2, ("--quant_lm_head",)),
    "llama-4x1024-opt": Case(partial(llama, 1024, 4), ("--iters", "0", "--clip_search")),
    "qwen3-moe-4x256": Case(mixture),
}


class Outcome(NamedTuple):
    """A model's foretold and measured figures: bytes of memory, of weight files, and seconds."""

    name: str
    foretold: tuple[int, int, float]
    measured: tuple[int, int, float]

    def line(self) -> str:
        """Columns of the table: each foretold, measured, and how far apart in percent."""
        columns = []
        for form, scale, own, real in zip(("{:.0f}", "{:,.0f}", "{:.0f}"), (1e6, 1, 1), self.foretold, self.measured,
                                          strict=True):  # fmt: skip
            columns += [form.format(own / scale), form.format(real / scale), f"{100 * (own / real - 1):+.1f}%"]
        return f"{self.name:16} " + " ".join(f"{each:>11}" for each in columns)


def save(name: str, folder: Path) -> None:
    """Write a model and its tokenizer."""
    torch.manual_seed(0)
    CASES[name].make().to(torch.bfloat16).save_pretrained(folder)
    train_tokenizer(python_docs(("train",))[:TEXTS]).save_pretrained(folder)


def compare(name: str, words: list[str], work: Path) -> Outcome:
    """Plan a run of a model, do it, and hold the two side by side."""
    save(name, work / "model")
    command = [sys.executable, "-m", "autoround"]
    words = [str(work / "model"), *words, *CASES[name].words, "--output_dir", str(work / "out")]
    measure([*command, "plan", *words, "--log_json"], work / "plan.txt", {})
    lines = (work / "plan.txt").read_text().splitlines()
    plan = next(told for told in map(json.loads, reversed(lines)) if told["event"] == "plan")
    cost = measure([*command, *words, "--quiet"], work / "run.txt", {})
    (files,) = plan["files"].values()
    written = sum((work / "out" / file).stat().st_size for file in files)
    foretold = (plan["memory"]["host"], sum(files.values()), plan["seconds"]["total"])
    return Outcome(name, foretold, (round(cost.gigabytes * 1e9), written, cost.seconds))


def run() -> None:
    """Parse options, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--nsamples", default="64")
    parser.add_argument("--seqlen", default="256")
    parser.add_argument("--iters", default="50")
    options = parser.parse_args()
    words = ["--dataset", "python-docs", "--group_size", "64", "--nsamples", options.nsamples]
    words += ["--seqlen", options.seqlen, "--iters", options.iters]
    print(f"{machine.describe()}; {' '.join(words)}", flush=True)
    titles = [f"{what} {unit}" for what in ("memory", "files", "time") for unit in ("told", "real", "off")]
    print(f"{'MB, bytes, s':16} " + " ".join(f"{title:>11}" for title in titles), flush=True)
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            print(compare(name, words, Path(folder)).line(), flush=True)


if __name__ == "__main__":
    run()
