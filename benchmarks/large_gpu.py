"""Whole runs on one GPU over blocks of an 8B model's shape: time and memory of autoround beside auto-round.

A random Llama of Llama 3 8B's widths, with fewer blocks, is quantized to 4 bits in groups of 128 by both commands, by
default and with ``--low_gpu_mem_usage``, each a process of its own with an empty cache of compiled code. Both are told
to compile, as they do by themselves for all 32 blocks. Seconds a block are the median of those between the lines that a
tool prints as its blocks are done: start, calibration and compilation of the first block do not count. Memory of the
GPU is nvidia-smi's, above what was in use before. A tool that fails or takes too long leaves the end of its log.

``python -m benchmarks.large_gpu [--blocks N] [--steps N] [--rows N] [--seqlen N] [--hidden N] [--device NAME]
[--tools NAME …] [--timeout SECONDS] [--json FILE]``
"""

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import machine
from benchmarks.cost import POLL_SECONDS, Failed, measure
from benchmarks.peers import OURS, SPARE, THEIRS, TOOLS, Job
from tests.data.words import make_tokenizer, write_random_texts

LOW = ("--low_gpu_mem_usage",)
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    OURS: (OURS, ()), f"{OURS}-low": (OURS, LOW), THEIRS: (THEIRS, ()), f"{THEIRS}-low": (THEIRS, LOW)}  # fmt: skip
"""Name -> the tool, and what its command gets besides."""
DONE = {OURS: re.compile(r"^block \d+/\d+ ", re.MULTILINE), THEIRS: re.compile(r"layers in the block, loss")}
"""What a tool prints when a block is done."""
HEAD, VOCABULARY, GROUP_SIZE = 128, 128_256, 128
LAST_LINES = 15


def make_job(options: argparse.Namespace, folder: Path) -> Job:
    """Save a random model, a tokenizer of words and rows of them, and say what is asked of both tools."""
    torch.manual_seed(0)
    heads = max(options.hidden // HEAD, 1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=options.hidden, intermediate_size=options.hidden * 7 // 2,
        num_attention_heads=heads, num_key_value_heads=max(heads // 4, 1), num_hidden_layers=options.blocks,
        tie_word_embeddings=True, dtype=torch.bfloat16)  # fmt: skip
    with torch.device(options.device):
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.cpu().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    texts = write_random_texts(folder / "texts.jsonl", options.rows, options.seqlen + SPARE)
    return Job(
        source=folder / "model", texts=texts, tokens=folder / "unused.json", output=folder / "out", bits=4,
        group_size=GROUP_SIZE, sym=True, rows=options.rows, seqlen=options.seqlen, seed=0, iters=options.steps,
        compiled=True, device=options.device)  # fmt: skip


@contextlib.contextmanager
def gpu_memory(wanted: bool) -> Iterator[list[int]]:
    """MiB in use on the first GPU, twenty times a second, all there once the context is left; none unless wanted."""
    megabytes: list[int] = []
    if not wanted:
        yield megabytes
        return
    query = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "50"]
    with tempfile.TemporaryFile("w+") as samples:
        process = subprocess.Popen(query, stdout=samples)
        try:
            time.sleep(1)
            yield megabytes
        finally:
            process.terminate()
            process.wait()
            samples.seek(0)
            megabytes += [int(line) for line in samples if line.strip().isdigit()]


@contextlib.contextmanager
def line_times(log: Path, done: re.Pattern[str]) -> Iterator[list[float]]:
    """When lines that match were first seen in a log that grows."""
    times: list[float] = []
    over = threading.Event()

    def look() -> None:
        ended = False
        while not ended:
            ended = over.wait(POLL_SECONDS)
            seen = len(done.findall(log.read_text(errors="replace"))) if log.exists() else 0
            times.extend([time.monotonic()] * (seen - len(times)))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield times
    finally:
        over.set()
        thread.join()


def run_case(name: str, job: Job, folder: Path, timeout: float) -> dict[str, Any]:
    """One command from beginning to end; seconds in all and a block, GB of the GPU and of the host.

    Raises:
        Failed: it failed or took longer than ``timeout`` seconds.
    """
    tool, extra = CASES[name]
    log = folder / f"{name}.log"
    command = [*TOOLS[tool].recipes["default"](replace(job, output=folder / name)), *extra]
    with gpu_memory(job.device.startswith("cuda")) as megabytes, line_times(log, DONE[tool]) as times:
        begun = time.monotonic()
        cost = measure(command, log, dict(TOOLS[tool].variables), timeout=timeout)
    blocks = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    return {
        "seconds": cost.seconds,
        "first": times[0] - begun if times else None,
        "blocks": blocks,
        "block": statistics.median(blocks) if blocks else None,
        "gpu_gigabytes": (max(megabytes) - megabytes[0]) * 2**20 / 1e9 if megabytes else None,
        "host_gigabytes": cost.gigabytes,
    }


def line(name: str, found: dict[str, Any]) -> str:
    """The figures of a tool."""

    def figure(key: str, digits: int = 1) -> str:
        return "-" if found[key] is None else f"{found[key]:.{digits}f}"

    return (
        f"{name:15} {figure('seconds'):>7} s whole, first block after {figure('first')} s, then {figure('block', 2)} s "
        f"a block; {figure('gpu_gigabytes')} GB of the GPU, {figure('host_gigabytes')} GB of the host"
    )


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Options from the command line, or from words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("blocks", 4), ("steps", 200), ("rows", 128), ("seqlen", 2048), ("hidden", 4096)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tools", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a tool")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args(words)


def run() -> None:
    """Measure and print, a line as soon as a tool is done."""
    options, found = parse(), {}
    print(machine.describe(), flush=True)
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name(), flush=True)
    print(f"{options.blocks} blocks of {options.hidden} columns, {options.rows} x {options.seqlen} tokens, "
          f"{options.steps} steps", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        job = make_job(options, folder)
        for name in options.tools:
            try:
                found[name] = run_case(name, job, folder, options.timeout)
                print(line(name, found[name]), flush=True)
            except Failed as error:
                last = (folder / f"{name}.log").read_text(errors="replace").splitlines()[-LAST_LINES:]
                print("\n  ".join([f"{name:15} {error}", *last]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    run()
