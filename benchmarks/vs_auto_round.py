"""The same work with auto-round 0.16.1 and with this package, one after the other on an idle machine.

For each seed both quantize the dithered SmolLM2 on the same rows of text, as whole processes with cold compile
caches; wall time and peak memory are those of the processes. Both results are then loaded by the same code and
scored on the same held-out tokens. Run ``python benchmarks/vs_auto_round.py``; the environment of auto-round is
made by ``make client-environments``.
"""

import argparse
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import autoround
from autoround.backends.cpu import CPU
from autoround.data.language import parse_specs
from autoround.data.sources import documents
from autoround.evaluate import TokenScores, compare
from benchmarks import machine, smollm2

ROOT = Path(__file__).parents[1]
CLIENT = Path(os.environ.get("AUTOROUND_CLIENT_VENV") or ROOT / ".venv-clients") / "auto-round" / "bin" / "python"
BOOTSTRAPS = 2000
POLL_SECONDS = 0.05
BLOCK_SECONDS = re.compile(r"^block \d+/\d+ .*?  ([\d.]+) s", re.MULTILINE)


class Cost(NamedTuple):
    """Of one command: wall time in seconds, and peak resident memory in GB of the process and with its children.

    The children are C++ compilers; what they share with the process counts once.
    """

    seconds: float
    gigabytes: float
    tree_gigabytes: float


def write_calibration(file: Path, *, rows: int, seqlen: int, seed: int) -> None:
    """Texts of a little more than ``seqlen`` tokens each, so that both tools cut the same rows from them."""
    tokenizer = smollm2.load_tokenizer()
    texts = documents(parse_specs("python-docs")[0], rng=random.Random(seed), rows=rows)
    found: list[str] = []
    for document in texts:
        ids = tokenizer(document if isinstance(document, str) else str(document), verbose=False).input_ids
        found += [tokenizer.decode(ids[i : i + seqlen + 32]) for i in range(0, len(ids) - seqlen - 32, seqlen + 32)]
        if len(found) >= rows:
            break
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in found[:rows]))


def measured_once(command: list[str], log: Path) -> Cost:
    """``measure``, or what it found when an interrupted benchmark ran the same command."""
    record = log.with_suffix(".json")
    if not record.exists():
        cost = measure(command, log)
        record.write_text(json.dumps(cost._asdict()))
    return Cost(**json.loads(record.read_text()))


def measure(command: list[str], log: Path) -> Cost:
    """Run a command with a compile cache of its own.

    Raises:
        SystemExit: it failed; its output is in the log.
    """
    with tempfile.TemporaryDirectory() as cache, log.open("w") as output:
        settings = {"TORCHINDUCTOR_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **settings}
        start = time.monotonic()
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=log.parent)
        own = tree = 0
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                rss = process.memory_info().rss
                own = max(own, rss)
                tree = max(tree, rss + sum(_unshared(child) for child in process.children(recursive=True)))
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: failed; see {log}")
    return Cost(seconds, own / 1e9, tree / 1e9)


def compilation_seconds(log: Path) -> float:
    """What the first block of one of our runs took beyond the median of the others."""
    first, *others = (float(seconds) for seconds in BLOCK_SECONDS.findall(log.read_text()))
    return first - statistics.median(others)


def _unshared(process: psutil.Process) -> int:
    """Memory of a process alone: between fork and exec it shares all of its parent's."""
    try:
        return int(process.memory_full_info().uss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def commands(options: argparse.Namespace, source: Path, data: Path, seed: int, folder: Path) -> dict[str, list[str]]:
    """How each tool is called."""
    settings = ["--bits", str(options.bits), "--group_size", str(options.group_size), "--iters", str(options.iters),
                "--nsamples", str(options.nsamples), "--seqlen", str(options.seqlen), "--batch_size", "8",
                "--seed", str(seed), "--format", "auto_round"]  # fmt: skip
    ours = [str(source), *settings, "--dataset", f"{data}:concat=False", "--enable_torch_compile"]
    theirs = [str(source), *settings, "--dataset", str(data), "--enable_torch_compile", "--device_map", "cpu"]
    return {
        "autoround": [sys.executable, "-m", "autoround", *ours, "--output_dir", str(folder / "autoround")],
        "auto-round": [str(CLIENT), "-m", "auto_round", *theirs, "--output_dir", str(folder / "auto-round")],
    }


def checkpoint(folder: Path) -> Path:
    """The folder with the configuration, wherever below ``folder`` the tool put it."""
    return next(file.parent for file in sorted(folder.rglob("config.json")))


def bootstrap(difference_P: Tensor, *, length: int = 64) -> tuple[float, float]:
    """95% interval of a mean over tokens, drawing runs of neighbouring tokens, which depend on each other."""
    runs_R = difference_P[: len(difference_P) // length * length].view(-1, length).mean(1)
    draws = torch.randint(len(runs_R), (BOOTSTRAPS, len(runs_R)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(runs_R[draws].mean(1), torch.tensor([0.025, 0.975], dtype=runs_R.dtype)).tolist()
    return low, high


def report(costs: dict[str, list[Cost]], scores: dict[str, list[TokenScores]]) -> None:
    """Print a table row per tool and the paired difference."""
    for tool, own in costs.items():
        kls = [score.kl for score in scores[tool]]
        times, memory = [cost.seconds for cost in own], max(cost.gigabytes for cost in own)
        tree = max(cost.tree_gigabytes for cost in own)
        print(
            f"{tool:>12}: KL {sum(kls) / len(kls):.4f} ({' '.join(f'{kl:.4f}' for kl in kls)})   "
            f"time {sum(times) / len(times):.0f} s ({' '.join(f'{t:.0f}' for t in times)})   peak {memory:.2f} GB "
            f"({tree:.2f} GB with compilers)"
        )
    ours, theirs = (torch.stack([score.kl_P for score in scores[tool]]).mean(0) for tool in ("autoround", "auto-round"))
    low, high = bootstrap(ours - theirs)
    print(f"  difference: KL {float((ours - theirs).mean()):+.4f}, 95% interval {low:+.4f} … {high:+.4f}")
    print("              (negative: the result of autoround is closer to the float model)")


def run() -> None:
    """Parse options, run both tools for every seed, score, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--iters", type=int, default=50)
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=None, help="held-out rows to score; all when not given")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "vs-auto-round",
                        help="where finished runs are kept; the same command goes on from them")  # fmt: skip
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name not in ("folder", "seeds", "rows")}
    options.folder /= "-".join(f"{name}{value}" for name, value in settings.items())
    options.folder.mkdir(parents=True, exist_ok=True)
    source = options.folder / "smollm2-dithered"
    if not (source / "config.json").exists():
        smollm2.save_dithered(source)
    print(machine.describe())
    print(f"SmolLM2-135M dithered, W{options.bits} g{options.group_size} sym, {options.iters} iterations, "
          f"{options.nsamples} x {options.seqlen} tokens, batch 8, {options.seeds} seeds", flush=True)  # fmt: skip
    costs: dict[str, list[Cost]] = {"autoround": [], "auto-round": []}
    for seed in range(options.seeds):
        folder = options.folder / f"seed-{seed}"
        folder.mkdir(exist_ok=True)
        data = folder / "calibration.jsonl"
        write_calibration(data, rows=options.nsamples, seqlen=options.seqlen, seed=seed)
        for tool, command in commands(options, source, data, seed, folder).items():
            costs[tool].append(measured_once(command, folder / f"{tool}.log"))
            seconds, gigabytes, _ = costs[tool][-1]
            print(f"seed {seed}: {tool} {seconds:.0f} s, {gigabytes:.2f} GB", flush=True)
    dtype = CPU.compute_dtype()
    rows_NT = smollm2.held_out_rows(smollm2.load_tokenizer(), seqlen=options.seqlen, rows=options.rows)
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    models = {
        f"{tool}/{seed}": autoround.load(checkpoint(options.folder / f"seed-{seed}" / tool), dtype=dtype)
        for tool in costs
        for seed in range(options.seeds)
    }
    found = compare(reference, models, rows_NT)
    scores = {tool: [found[f"{tool}/{seed}"] for seed in range(options.seeds)] for tool in costs}
    print(f"logits of all models in {dtype}")
    print(f"held-out: {rows_NT.shape[0] * (rows_NT.shape[1] - 1)} predicted tokens of Python documentation")
    report(costs, scores)
    logs = [options.folder / f"seed-{seed}" / "autoround.log" for seed in range(options.seeds)]
    compiled = " ".join(f"{compilation_seconds(log):.0f}" for log in logs)
    print(f"   autoround: of that, {compiled} s for compiling, once in a run, with a cold cache")


if __name__ == "__main__":
    run()
