"""Which settings reach which quality: many recipes on one model, judged alike; how defaults are chosen.

``python -m benchmarks.sweep [--model NAME] [--groups NAME …] [--bits N …] [--seeds N …] [--blocks N] [--rows N] [--jobs
N] [--minutes N] [--device NAME] [--folder FOLDER]`` quantizes a model, or its first blocks, by each variant of the
named groups and prints KL divergence from the float model in four domains, and seconds a block without the first one.
Variants are shared among ``--jobs`` processes on one device: their times then say nothing, the divergences are the
same. What a variant found is a line of ``FOLDER/sweep-JOB.jsonl`` and is not computed again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from autoround import func
from autoround.engine import quantize
from autoround.journal import Journal
from autoround.recipe import Recipe
from benchmarks import domains, machine, models, quality
from benchmarks.cells import DATA, GROUP_SIZE, Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A recipe to try.

    Attributes:
        bits: of the weights.
        settings: over it, as (name, value).
        seed: of calibration rows and batches.
    """

    bits: int
    settings: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    @property
    def name(self) -> str:
        """Unique."""
        words = [f"{name}={value}" for name, value in self.settings]
        return " ".join([f"w{self.bits}", *words, f"seed{self.seed}"])


def _variants(bits: int, **axes: tuple[Any, ...]) -> list[Variant]:
    """All combinations of the axes' values."""
    found: list[tuple[tuple[str, Any], ...]] = [()]
    for name, values in axes.items():
        found = [(*own, (name, value)) for own in found for value in values]
    return [Variant(bits=bits, settings=own) for own in found]


def _paced(bits: int, *paces: tuple[int, int], parts: tuple[float, ...], compensate: bool = False) -> list[Variant]:
    """So many steps of so many rows, each with parts of the rate 1 / steps."""
    start: tuple[tuple[str, Any], ...] = (("compensate", True),) if compensate else ()
    return [
        Variant(bits=bits, settings=(("iters", steps), ("batch_size", rows), ("lr", part / steps), *start))
        for steps, rows in paces
        for part in parts
    ]


def groups(bits: int) -> dict[str, list[Variant]]:
    """The questions, each with its variants."""
    both = (False, True)
    return {
        "start": _variants(bits, iters=(0,), clip_search=both, compensate=both),
        "opt_rtn": _variants(bits, iters=(0,), clip_search=(True,)),
        "steps": _variants(bits, iters=(25, 50, 100, 200)),
        "light": _variants(bits, iters=(15, 50), compensate=both, lr=(0.005,)),
        "rate": _variants(bits, iters=(25,), lr=(0.0025, 0.005, 0.01, 0.02, 0.04)),
        "rate50": _paced(bits, (50, 8), parts=(0.25, 0.5, 1.0)),
        "rate200": _paced(bits, (200, 8), parts=(0.25, 0.5, 1.0, 2.0)),
        "half200": _paced(bits, (200, 8), parts=(0.5, 1.0)),
        "clips": _variants(bits, iters=(25,), minmax_lr=(0.01, 0.02, 0.08)),
        "momentum": _variants(bits, iters=(25,), momentum=(0.5, 0.9), lr=(0.02, 0.04)),
        "pace": _paced(bits, (25, 8), (50, 4), (100, 2), parts=(0.25, 0.5, 1.0)),
        "compensated": _paced(bits, (25, 8), (50, 4), parts=(0.0625, 0.125, 0.25, 0.5), compensate=True),
        "compensated200": _paced(bits, (200, 8), parts=(0.0625, 0.125, 0.25, 0.5), compensate=True),
        "start200": _variants(bits, iters=(200,), clip_search=both, keep=("best", "last")),
        "adam": _variants(bits, iters=(25,), adam=(True,), lr=(0.01, 0.02, 0.04)),
        "keep": _variants(bits, iters=(25,), keep=("best",)),
        "scales": _variants(bits, iters=(0,), clip_search=(True,), scale_steps=(0, 32, 64, 128)),
        "scales200": _variants(bits, iters=(200,), scale_steps=(0, 64)),
        "apart": _variants(bits, iters=(25,), lr=(0.04,), parallel=("data", "blocks")),
    }


@dataclass(frozen=True, slots=True)
class Texts:
    """Rows of token ids to calibrate on, and documents to judge on, by domain."""

    calibration: list[list[int]]
    documents: dict[str, list[list[int]]]


def read_texts(place: Place, model: str, seed: int, *, tokens: int) -> tuple[Path, Texts]:
    """The model's folder and its texts, made where they are not there yet."""
    job = place.job(model, place.folder, bits=4, data=DATA, seed=seed, iters=None)
    file = place.folder / "calibration" / f"{model}-documents-{tokens}.json"
    if not file.exists():
        tokenizer, share = AutoTokenizer.from_pretrained(job.source), -(-tokens // len(domains.DOMAINS))
        rows = {name: domains.read(name, job.source, tokenizer, tokens=share) for name in domains.DOMAINS}
        file.write_text(json.dumps(rows))
    return job.source, Texts(json.loads(job.tokens.read_text()), json.loads(file.read_text()))


def load(source: Path, device: torch.device) -> nn.Module:
    """The float model, in float32."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device).eval()
    return model


def try_variant(
    variant: Variant, source: Path, texts: Texts, candidate: nn.Module, options: argparse.Namespace
) -> tuple[list[float], float]:
    """Quantize by a variant and put the result into the candidate; losses of blocks' last steps, seconds a block."""
    with tempfile.TemporaryDirectory() as folder:
        own: dict[str, Any] = {
            "bits": variant.bits, "group_size": GROUP_SIZE, "nsamples": options.rows, "seqlen": DATA[1],
            "dataset": texts.calibration[: options.rows], "seed": variant.seed, "output_dir": f"{folder}/out",
            "device_map": options.device, "torch_compile": options.device == "cpu"}  # fmt: skip
        run = quantize(source, Recipe(**own | dict(variant.settings)))
        events = iter(run)
        blocks = list(islice(events, options.blocks))
        if len(blocks) == len(run.plan.parts):
            list(events)  # what comes after the last block is done
        journal = Journal(run.journal_folder, {})
        for index, part in enumerate(run.plan.parts[: len(blocks)]):
            for path, codes in journal.read_block(index).items():
                weight = candidate.get_submodule(f"{part.prefix}{path}").weight
                with torch.no_grad():
                    weight.copy_(func.dequantize(codes, part.specs[path]))
    rest = [done.seconds for done in blocks[1:]]
    return [done.loss_last for done in blocks], sum(rest) / max(len(rest), 1)


def work(options: argparse.Namespace) -> None:
    """What one process does: its share of the variants."""
    place, end = Place(folder=options.folder), time.monotonic() + 60 * options.minutes
    device = torch.device(options.device)
    file = options.folder / f"sweep-{options.job}.jsonl"
    reference: nn.Module | None = None
    waiting = [variant for variant in chosen(options) if name(variant, options) not in options.done]
    for variant in waiting[options.job :: options.jobs]:
        if time.monotonic() > end:
            return
        source, texts = read_texts(place, options.model, variant.seed, tokens=options.tokens)
        if reference is None:
            reference, candidate = load(source, device), load(source, device)
        losses, seconds = try_variant(variant, source, texts, candidate, options)
        rows = [row for own in texts.documents.values() for row in own]
        scores = quality.judge(reference, {"it": candidate}, rows)["it"]
        sizes = [len(own) for own in texts.documents.values()]
        parts = zip(texts.documents, zip(*(field.split(sizes) for field in scores), strict=True), strict=True)
        kl = {name: float(own[2].sum() / own[0].sum()) for name, own in parts}
        kl["all"] = float(scores.kl_D.sum() / scores.tokens_D.sum())
        found = {
            "name": name(variant, options),
            "kl": kl,
            "losses": losses,
            "seconds": seconds,
            "machine": machine.describe(),
        }
        with file.open("a") as output:
            output.write(json.dumps(found) + "\n")
        print(line(found), flush=True)


def chosen(options: argparse.Namespace) -> list[Variant]:
    """The variants that are asked for, group after group, each once."""
    found = [
        replace(variant, seed=seed)
        for name in options.groups
        for bits in options.bits
        for seed in options.seeds
        for variant in groups(bits)[name]
    ]
    return list({variant.name: variant for variant in found}.values())


def name(variant: Variant, options: argparse.Namespace) -> str:
    """Of a variant on this much of the model and the data, at the rate that it takes where none is set."""
    rate = Recipe(**dict(variant.settings)).learning_rate(variant.bits)
    amount = f"blocks={options.blocks} rows={options.rows} tokens={options.tokens}"
    return f"{options.model} {variant.name} rate={rate:g} {amount}"


def results(folder: Path) -> list[dict[str, Any]]:
    """All that was found so far."""
    files = sorted(folder.glob("sweep-*.jsonl"))
    return [json.loads(text) for file in files for text in file.read_text().splitlines()]


def line(found: dict[str, Any]) -> str:
    """One variant's figures."""
    kl = found["kl"]
    own = " / ".join(f"{kl[name]:.3g}" for name in domains.DOMAINS)
    return f"KL {kl['all']:.4g} ({own})  {found['seconds']:6.2f} s a block  {found['name']}"


def main() -> None:
    """Parse options, start the processes, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.MODELS, default="smollm2-dithered")
    parser.add_argument("--groups", nargs="+", choices=list(groups(4)), default=list(groups(4)), metavar="NAME")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of calibration rows and batches")
    parser.add_argument("--blocks", type=int, default=30, help="the first ones; the others stay as they are")
    parser.add_argument("--rows", type=int, default=DATA[0], help="of calibration")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=600, help="after which no further variant is begun")
    parser.add_argument("--tokens", type=int, default=12_000, help="predicted tokens of the judge, over all domains")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "autoround-bench")
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--done", nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        work(options)
        return
    print(machine.describe(), flush=True)
    read_texts(Place(folder=options.folder), options.model, 0, tokens=options.tokens)
    command = [sys.executable, "-m", "benchmarks.sweep", *sys.argv[1:], "--jobs", str(options.jobs), "--done",
               *(each["name"] for each in results(options.folder))]  # fmt: skip
    processes = [subprocess.Popen([*command, "--job", str(job)]) for job in range(options.jobs)]
    failed = [process.wait() for process in processes]
    names = {name(variant, options) for variant in chosen(options)}
    print("\n".join(["", *(line(found) for found in results(options.folder) if found["name"] in names)]))
    sys.exit(any(failed))


if __name__ == "__main__":
    main()
