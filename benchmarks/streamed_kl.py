"""Memory and time of KL divergence block by block, beside that of both models in memory, and how far they differ.

A Llama of random weights and many layers, as a bfloat16 folder, and the same rounded to nearest in 4 bits; both compute
in float32. Memory is the peak of a process of its own, files mapped included, less what it held before it opened
anything.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import autoround
from autoround.evaluate import compare, compare_streamed
from autoround.evaluate.opening import open_checkpoint
from autoround.evaluate.stream import Rows, Streaming

if __package__:
    from benchmarks import machine
else:
    import machine

VOCABULARY, BATCH = 2048, 4
WAYS = ("direct", "streamed")


def make(folder: Path, *, layers: int, hidden: int) -> None:
    """The float model and its quantized copy."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=False,
        initializer_range=0.05)  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "float")
    recipe = autoround.Recipe.preset("rtn", group_size=64, clip_search=False, output_dir=str(folder / "w4"))
    autoround.quantize(folder / "float", recipe).export()


def measured(folder: Path, way: str, rows: int, tokens: int) -> tuple[float, float]:
    """Seconds and peak megabytes of one way, in a process of its own."""
    command = [sys.executable, __file__, "--score", way, str(folder), "--rows", str(rows), "--tokens", str(tokens)]
    last = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    seconds, megabytes = map(float, last.split())
    return seconds, megabytes


def score(way: str, folder: Path, tokens_NT: Tensor) -> None:
    """What the process of ``measured`` does; prints its figures and keeps the scores."""
    before, start = peak(), time.monotonic()
    if way == "direct":
        models = [autoround.load(folder / name, dtype="float32") for name in ("float", "w4")]
        found = compare(models[0], {"w4": models[1]}, tokens_NT, batch_size=BATCH)["w4"]
    else:
        rows = Rows(tokens_NT, torch.ones_like(tokens_NT, dtype=torch.bool))
        opened = [open_checkpoint(folder / name) for name in ("float", "w4")]
        streaming = Streaming(batch_size=BATCH)
        found = compare_streamed(opened[0], {"w4": opened[1]}, rows, streaming=streaming)["w4"].scores
    seconds, megabytes = time.monotonic() - start, (peak() - before) / 1e6
    save_file({name: tensor.contiguous() for name, tensor in found._asdict().items()}, folder / f"{way}.safetensors")
    print(seconds, megabytes)


def peak() -> int:
    """Most memory that this process has held, in bytes."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def main() -> None:
    """Print one line for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--score", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    tokens_NT = torch.randint(0, VOCABULARY, (options.rows, options.tokens), generator=generator)
    if options.score:
        score(options.score[0], Path(options.score[1]), tokens_NT)
        return
    print(machine.describe())
    print(f"Llama, {options.layers} layers of {options.hidden}; {options.rows} x {options.tokens} tokens")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, layers=options.layers, hidden=options.hidden)
        costs = {way: measured(folder, way, options.rows, options.tokens) for way in WAYS}
        for way, (seconds, megabytes) in costs.items():
            print(f"{way:9} {megabytes:8.0f} MB {seconds:7.1f} s")
        print(f"streamed takes {costs['streamed'][1] / costs['direct'][1]:.2f} of the memory")
        direct, streamed = (load_file(folder / f"{way}.safetensors") for way in WAYS)
        kl = [float(scores["kl_P"].mean()) for scores in (direct, streamed)]
        worst = float((direct["kl_P"] - streamed["kl_P"]).abs().max())
        print(f"KL {kl[0]:.6f} and {kl[1]:.6f} nats per token; single tokens differ by {worst:.1e} at most")


if __name__ == "__main__":
    main()
