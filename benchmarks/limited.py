"""Peak memory of a model several times larger than a limit, of few and of many blocks, and beside auto-round's.

Llamas with random weights are quantized by whole commands in processes of their own, with few rows and steps, and
without our search for clips, which holds slices of bounded size and takes minutes. Three parts:

- ``limit``: a model of 30 blocks and about 3 GB, in files of at most 500 MB, under RLIMIT_DATA of what an interpreter
  has that imported torch and transformers, and 1.5 GB more: tuned, and rounded to nearest; auto-round under the same.
- ``growth``: models of 12 and of 48 equal blocks; anonymous memory, for which no file stands, must not grow.
- ``beside``: the model of ``limit`` without a limit, both tools; resident memory, mapped files included.

``python -m benchmarks.limited [PART …] [--hidden N] [--blocks N] [--spare GB]``
"""

import argparse
import dataclasses
import shutil
import subprocess
import tempfile
from pathlib import Path
from sys import executable
from types import MappingProxyType

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import machine
from benchmarks.cost import Cost, Failed, measure
from benchmarks.peers import OURS, SPARE, THEIRS, TOOLS, Job
from tests.clients.environments import client_python
from tests.data.words import make_tokenizer, write_random_texts

ROWS, SEQLEN, ITERS = 8, 64, 2
SHARD = "500MB"
# One thread, so that arenas and stacks of threads do not depend on the machine.
VARIABLES = MappingProxyType({"OMP_NUM_THREADS": "1"})
INTERPRETERS = {OURS: executable, THEIRS: str(client_python(THEIRS))}
IMPORTS = """
from pathlib import Path
from transformers import LlamaForCausalLM
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(*(int(status[name].split()[0]) * 1024 for name in ("VmData", "RssAnon")))
"""
GROWTH_HIDDEN, FEW, MANY = 1024, 12, 48


def make_model(folder: Path, *, hidden: int, blocks: int) -> str:
    """Save a Llama, drawn block by block, with a tokenizer of words; what it is, in words."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=59 * hidden, hidden_size=hidden, intermediate_size=hidden * 7 // 4, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, tie_word_embeddings=False,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)
    weights = sum(weight.numel() for weight in model.parameters())
    files = sorted(file.stat().st_size for file in folder.glob("*.safetensors"))
    return (
        f"Llama, {blocks} blocks of {hidden}, {weights / 1e9:.2f} B weights; {sum(files) / 1e9:.2f} GB in {len(files)} "
        f"files of at most {files[-1] / 1e6:.0f} MB"
    )


def make_job(folder: Path) -> Job:
    """What all are asked for: rows of random words."""
    texts = write_random_texts(folder / "texts.jsonl", ROWS, SEQLEN + SPARE)
    return Job(
        source=folder / "model", texts=texts, tokens=folder / "unused.json", output=folder / "out", bits=4,
        group_size=64, sym=True, rows=ROWS, seqlen=SEQLEN, seed=0, iters=ITERS)  # fmt: skip


def interpreter(name: str) -> tuple[int, int]:
    """Bytes of data and of anonymous memory that importing alone takes in a tool's environment."""
    found = subprocess.run([INTERPRETERS[name], "-c", IMPORTS], capture_output=True, text=True, check=True,
                           env={**VARIABLES})  # fmt: skip
    data, anonymous = map(int, found.stdout.split())
    return data, anonymous


def quantize(name: str, recipe: str, job: Job, *, data_limit: int | None = None) -> Cost | Failed:
    """One command from beginning to end; what it wrote is deleted."""
    if recipe == "rtn":
        job = dataclasses.replace(job, iters=None)
    folder = Path(tempfile.mkdtemp(dir=job.output.parent))
    own = dataclasses.replace(job, output=folder / "out")
    variables, words = VARIABLES | dict(TOOLS[name].variables), TOOLS[name].recipes[recipe](own)
    words += ["--no_clip_search"] * (name == OURS)
    try:
        return measure(words, folder / "log.txt", variables, data_limit=data_limit)
    except Failed as failed:
        return failed
    finally:
        shutil.rmtree(folder)


def told(name: str, recipe: str, found: Cost | Failed) -> str:
    """A line of the report."""
    title = f"{name}, {recipe}:"
    if isinstance(found, Failed):
        return f"{title:22} failed: {str(found).partition(': ')[2][-240:]}"
    return (
        f"{title:22} {found.gigabytes:.2f} GB resident, {found.anonymous_gigabytes:.2f} GB of it anonymous, "
        f"{found.seconds:.0f} s"
    )


def limit(job: Job, spare: float) -> None:
    """The model under a limit."""
    for name in (OURS, THEIRS):
        data, anonymous = interpreter(name)
        bound = data + round(spare * 1e9)
        print(f"{name}: interpreter {data / 1e9:.2f} GB of data, {anonymous / 1e9:.2f} GB anonymous; "
              f"RLIMIT_DATA {bound / 1e9:.2f} GB", flush=True)  # fmt: skip
        for recipe in ("default", "rtn"):
            print(told(name, recipe, quantize(name, recipe, job, data_limit=bound)), flush=True)


def growth() -> None:
    """Models of few and of many blocks."""
    _, start = interpreter(OURS)
    peaks = {}
    for recipe in ("default", "rtn"):
        for blocks in (FEW, MANY):
            with tempfile.TemporaryDirectory() as place:
                print(make_model(Path(place) / "model", hidden=GROWTH_HIDDEN, blocks=blocks), flush=True)
                found = quantize(OURS, recipe, make_job(Path(place)))
            print(told(OURS, recipe, found), flush=True)
            peaks[blocks] = 0.0 if isinstance(found, Failed) else found.anonymous_gigabytes
        grown, beyond = peaks[MANY] / peaks[FEW] - 1, (peaks[MANY] - start / 1e9) / (peaks[FEW] - start / 1e9) - 1
        print(f"anonymous memory, {recipe}: {100 * grown:+.1f}% with {MANY} blocks in place of {FEW}; "
              f"{100 * beyond:+.1f}% of what is beyond the interpreter", flush=True)  # fmt: skip


def beside(job: Job) -> None:
    """Both tools without a limit."""
    for recipe in ("default", "rtn"):
        costs = [quantize(name, recipe, job) for name in (OURS, THEIRS)]
        for name, found in zip((OURS, THEIRS), costs, strict=True):
            print(told(name, recipe, found), flush=True)
        peaks = [each.gigabytes for each in costs if isinstance(each, Cost)]
        if len(peaks) == len(costs):
            print(f"resident memory, {recipe}: {peaks[0] / peaks[1]:.2f} of auto-round's", flush=True)


PARTS = ("limit", "growth", "beside")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Options from the command line, or from words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help="all of them by default")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--spare", type=float, default=1.5, help="GB beyond the interpreter")
    options = parser.parse_args(words)
    options.parts = options.parts or list(PARTS)
    return options


def main() -> None:
    """Measure and print."""
    options = parse()
    print(f"{machine.describe()}; {ROWS} rows of {SEQLEN} tokens, {ITERS} steps, one thread", flush=True)
    if "growth" in options.parts:
        growth()
    if {"limit", "beside"}.isdisjoint(options.parts):
        return
    with tempfile.TemporaryDirectory() as place:
        print(make_model(Path(place) / "model", hidden=options.hidden, blocks=options.blocks), flush=True)
        job = make_job(Path(place))
        if "limit" in options.parts:
            limit(job, options.spare)
        if "beside" in options.parts:
            beside(job)


if __name__ == "__main__":
    main()
