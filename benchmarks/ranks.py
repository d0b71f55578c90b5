"""Seconds that one and two processes of torchrun take for the same run, each of them with one thread.

A Llama with random weights is quantized in float32 or bfloat16, as the machine chooses, uncompiled, by the command;
runs of one process, of two that share the rows of steps, and of two that share blocks take turns, from the first
process's begin to the last one's end. What a run of one step takes is measured too, so that the steps can be told apart
from loading, capturing, searching and writing. The files of all runs of a mode must be equal. Two threads of one core
are not two cores: see ``Thread(s) per core``.

``python -m benchmarks.ranks [--hidden N] [--blocks N] [--rows N] [--seqlen N] [--batch N] [--iters N] [--rounds N]``
"""

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import machine
from tests.data.words import make_tokenizer, random_texts

SPARE = 64
# Processes, and what they share.
CASES = ((1, "data"), (2, "data"), (2, "blocks"))


def make_model(options: argparse.Namespace, folder: Path) -> None:
    """Save a model with random weights, a tokenizer of words, and rows of them."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=options.hidden, intermediate_size=options.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=options.blocks, num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64, tie_word_embeddings=False)  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("\n\n".join(random_texts(options.rows, options.seqlen + SPARE)))


def seconds(options: argparse.Namespace, folder: Path, case: tuple[int, str], iters: int) -> tuple[float, str]:
    """Of one run, and a hash of its files."""
    output = Path(tempfile.mkdtemp(dir=folder)) / "out"
    words = {
        "nproc-per-node": case[0], "parallel": case[1], "nsamples": options.rows, "seqlen": options.seqlen,
        "batch_size": options.batch, "iters": iters, "dataset": folder / "texts.txt", "output_dir": output,
        "device_map": "cpu", "bits": 4,
    }  # fmt: skip
    flags = {name: [f"--{name}", str(value)] for name, value in words.items()}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", *flags.pop("nproc-per-node")]
    command = [*launcher, "-m", "autoround", str(folder / "model"), "--disable_torch_compile", "--quiet"]
    begun = time.monotonic()
    subprocess.run(
        [*command, *(word for pair in flags.values() for word in pair)], check=True, stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    taken, total = time.monotonic() - begun, hashlib.sha256()
    for file in sorted(output.rglob("*.safetensors")):
        total.update(file.read_bytes())
    return taken, total.hexdigest()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"hidden": 512, "blocks": 4, "rows": 64, "seqlen": 256, "batch": 8, "iters": 100, "rounds": 3}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    print(f"{machine.describe()}; {threads_per_core()}")
    print("  ".join(f"{name} {getattr(options, name)}" for name in defaults))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(options, folder)
        taken: dict[tuple[tuple[int, str], int], list[float]] = {}
        found: dict[tuple[str, int], set[str]] = {}
        for number in range(options.rounds):
            for case in CASES if number % 2 == 0 else reversed(CASES):
                for iters in (1, options.iters):
                    spent, files = seconds(options, folder, case, iters)
                    taken.setdefault((case, iters), []).append(spent)
                    found.setdefault((case[1], iters), set()).add(files)
    for (mode, iters), hashes in found.items():
        assert len(hashes) == 1, f"{mode}, {iters} steps: found {len(hashes)} different outputs"
    for (case, iters), own in taken.items():
        print(f"{name_of(case)}, {iters:4} steps: {', '.join(f'{each:.1f}' for each in own)} s")
    middle = {key: statistics.median(own) for key, own in taken.items()}
    whole = {case: middle[case, options.iters] for case in CASES}
    steps = {case: whole[case] - middle[case, 1] for case in CASES}
    one, *others = CASES
    for case in others:
        ratios = (
            f"whole runs {whole[one] / whole[case]:.2f} times, the steps alone {steps[one] / steps[case]:.2f} times"
        )
        print(f"{name_of(case)}: {ratios} as fast as {name_of(one)}")


def name_of(case: tuple[int, str]) -> str:
    """As it is printed."""
    return "1 process" if case[0] == 1 else f"{case[0]} processes, --parallel {case[1]}"


def threads_per_core() -> str:
    """What lscpu says."""
    lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout.splitlines()
    return next((" ".join(line.split()) for line in lines if line.startswith("Thread(s) per core")), "lscpu: unknown")


if __name__ == "__main__":
    main()
