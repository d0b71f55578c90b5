"""Seconds of one tuning step of a block of many experts: autoround beside auto-round, on the same block and rows.

A model of one Qwen 3 MoE block with random weights is quantized by both commands, each in its own environment, with few
steps and with many; what the many take longer, divided by how many they are more, is a step. So loading, calibration,
compiling and writing do not count. Rounds alternate between the tools; the medians are compared. Peak memory is that of
the whole process with many steps.

``python -m benchmarks.moe_step [--experts N] [--hidden N] [--intermediate N] [--rows N] [--seqlen N] [--batch N]
[--iters FEW MANY] [--rounds N] [--compiled] [--json FILE]``
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from benchmarks import machine
from benchmarks.cost import Cost, measure
from benchmarks.peers import OURS, SPARE, THEIRS, TOOLS, Job
from tests.data.words import make_tokenizer, write_random_texts

HEAD = 64
CHOSEN = 8


def make_model(options: argparse.Namespace, folder: Path) -> None:
    """Save a model of one block with random weights, and a tokenizer of words."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=options.hidden, moe_intermediate_size=options.intermediate,
        intermediate_size=options.intermediate, num_experts=options.experts, num_experts_per_tok=CHOSEN,
        norm_topk_prob=True, num_hidden_layers=1, num_attention_heads=options.hidden // HEAD,
        num_key_value_heads=options.hidden // HEAD, head_dim=HEAD, tie_word_embeddings=False)  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_job(options: argparse.Namespace, folder: Path) -> Job:
    """What both are asked for: rows of random words."""
    texts = write_random_texts(folder / "texts.jsonl", options.rows, options.seqlen + SPARE)
    return Job(
        source=folder / "model", texts=texts, tokens=folder / "unused.json", output=folder / "out", bits=options.bits,
        group_size=options.group_size, sym=True, rows=options.rows, seqlen=options.seqlen, seed=0,
        compiled=options.compiled, batch_size=options.batch)  # fmt: skip


def run_tool(name: str, job: Job, iters: int, folder: Path, place: str) -> Cost:
    """One command from beginning to end, with compiled code kept between its runs."""
    tool, cache = TOOLS[name], folder / f"cache-{name}"
    cache.mkdir(exist_ok=True)
    own = dataclasses.replace(job, iters=iters, output=folder / f"{name}-{iters}-{place}")
    command = tool.recipes["default"](own)
    return measure(command, folder / f"{own.output.name}.log", dict(tool.variables), cache=cache)


def measured(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Tool -> seconds of a step in every round, their median, and gigabytes."""
    make_model(options, folder / "model")
    job, (few, many) = make_job(options, folder), options.iters
    found: dict[str, dict[str, Any]] = {name: {"steps": [], "gigabytes": 0.0} for name in (OURS, THEIRS)}
    for name in found:
        run_tool(name, job, few, folder, "warm-up")
    for place in range(options.rounds):
        for name, own in found.items():
            short, long = (run_tool(name, job, iters, folder, str(place)) for iters in (few, many))
            own["steps"].append((long.seconds - short.seconds) / (many - few))
            own["gigabytes"] = max(own["gigabytes"], long.gigabytes)
    return {name: {**own, "step": statistics.median(own["steps"])} for name, own in found.items()}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Options from the command line, or from words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("experts", 64), ("hidden", 256), ("intermediate", 128), ("bits", 4), ("group-size", 32),
                        ("rows", 32), ("seqlen", 256), ("batch", 8), ("rounds", 3)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--iters", type=int, nargs=2, default=(20, 120), metavar=("FEW", "MANY"))
    parser.add_argument("--compiled", action="store_true", help="tell both to compile; else each decides")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args(words)


def run() -> None:
    """Measure and print."""
    options = parse()
    print(machine.describe(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        found = measured(options, Path(folder))
    print(f"{options.experts} experts of {options.hidden} x {options.intermediate}, {options.batch} x {options.seqlen} "
          f"tokens, {options.bits} bits in groups of {options.group_size}")  # fmt: skip
    for name, own in found.items():
        rounds = ", ".join(f"{1e3 * each:.0f}" for each in own["steps"])
        print(f"{TOOLS[name].version}: {1e3 * own['step']:.0f} ms a step ({rounds}), {own['gigabytes']:.2f} GB at most")
    print(f"{found[THEIRS]['step'] / found[OURS]['step']:.1f} times as fast")
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    run()
