"""The cells of the benchmark: what is run once, alone, and kept as one JSON file.

Three kinds. A ``Run`` is a whole quantization, a process from start to checkpoint, which is judged later. A ``Slope``
is two runs that differ in their steps, so that what remains is the time of steps, without start, compilation and
writing. A ``Step`` is ``benchmarks/step.py`` twice with one compile cache: cold, then as a second start finds it.
"""

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks import models, peers
from benchmarks.cost import Cost, measure
from benchmarks.peers import OURS, THEIRS, TOOLS, Job

GROUP_SIZE, SEEDS, DATA = 64, (0, 1, 2), (128, 256)
# Models with bits, and recipes that would take hours.
RUNS = (("small-llama", (4, 2, 3), ()), ("smollm2-dithered", (4, 2), ("best", "default+alg_ext", "light+alg_ext")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where models, calibration rows and the outputs of cells are kept."""

    folder: Path

    def of(self, name: str) -> Path:
        """The folder of a cell."""
        return self.folder / "cells" / name

    def job(self, model: str, own: Path, *, bits: int, data: tuple[int, int], seed: int, iters: int | None) -> Job:
        """A job on a model, with its calibration rows written."""
        rows, seqlen = data
        source = models.source(model, self.folder / "models")
        stem = self.folder / "calibration" / f"{model}-{rows}x{seqlen}-seed{seed}"
        texts, tokens = stem.with_suffix(".jsonl"), stem.with_suffix(".json")
        if not tokens.exists():
            stem.parent.mkdir(parents=True, exist_ok=True)
            tokenizer = AutoTokenizer.from_pretrained(source)
            peers.write_calibration(tokenizer, texts, tokens, rows=rows, seqlen=seqlen, seed=seed)
        return Job(
            source=source.resolve(), texts=texts.resolve(), tokens=tokens.resolve(), output=own.resolve() / "output",
            bits=bits, group_size=GROUP_SIZE, sym=True, rows=rows, seqlen=seqlen, seed=seed, iters=iters)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One tool's recipe on one model; cost of the whole process, cold caches."""

    model: str
    bits: int
    data: tuple[int, int]
    tool: str
    recipe: str
    seed: int

    @property
    def name(self) -> str:
        """Unique; also its folder."""
        rows, seqlen = self.data
        return f"run/{self.model}/w{self.bits}g{GROUP_SIZE}/{rows}x{seqlen}/{self.tool}.{self.recipe}/seed{self.seed}"

    def measure(self, place: Place) -> dict[str, Any]:
        """Quantize; cost and where the checkpoint is."""
        own, tool = place.of(self.name), TOOLS[self.tool]
        job = place.job(self.model, own, bits=self.bits, data=self.data, seed=self.seed, iters=None)
        cost = measure(tool.recipes[self.recipe](job), own / "log.txt", dict(tool.variables))
        checkpoint = tool.checkpoint(job)
        size = sum(file.stat().st_size for file in checkpoint.rglob("*.safetensors"))
        return {"settings": peers.as_record(job), "cost": cost._asdict(), "checkpoint": str(checkpoint), "bytes": size}


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """Seconds of a step, from two runs of few and of more steps.

    Attributes:
        topic: what the figure is for; cells of a topic stand in one table.
        steps: of both runs; so many more that seconds of compiling more or less do not count.
        threads: None leaves the tools their own choice.
    """

    topic: str
    model: str
    bits: int
    data: tuple[int, int]
    tool: str
    seed: int
    steps: tuple[int, int] = (20, 220)
    threads: int | None = None

    @property
    def name(self) -> str:
        """Unique; also its folder."""
        rows, seqlen = self.data
        data = f"{rows}x{seqlen}" + (f"/threads{self.threads}" if self.threads else "")
        return f"{self.topic}/{self.model}/w{self.bits}g{GROUP_SIZE}/{data}/{self.tool}/seed{self.seed}"

    def measure(self, place: Place) -> dict[str, Any]:
        """Run twice; seconds of one step of all blocks together."""
        own, tool = place.of(self.name), TOOLS[self.tool]
        costs: list[Cost] = []
        for steps in self.steps:
            part = own / f"steps{steps}"
            part.mkdir(parents=True, exist_ok=True)
            job = place.job(self.model, part, bits=self.bits, data=self.data, seed=self.seed, iters=steps)
            job = replace(job, compiled=True)
            variables = dict(tool.variables) | ({"OMP_NUM_THREADS": str(self.threads)} if self.threads else {})
            costs.append(measure(tool.recipes["default"](job), part / "log.txt", variables))
        few, more = self.steps
        return {
            "settings": peers.as_record(job) | {"steps": self.steps},
            "step_seconds": (costs[1].seconds - costs[0].seconds) / (more - few),
            "costs": [cost._asdict() for cost in costs],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step beside its own matrix products, and the first step after a start with cold and with warm caches."""

    bits: int
    seed: int

    @property
    def name(self) -> str:
        """Unique; also its folder."""
        return f"step/w{self.bits}g{GROUP_SIZE}/seed{self.seed}"

    def measure(self, place: Place) -> dict[str, Any]:
        """Run ``benchmarks/step.py`` twice; its figures of both starts."""
        own, found = place.of(self.name).resolve(), {}
        root = str(Path(__file__).parents[1])
        for start in ("cold", "warm"):
            file = own / f"{start}.json"
            command = [sys.executable, "-m", "benchmarks.step", "--bits", str(self.bits), "--json", str(file)]
            measure(command, own / f"{start}.txt", {"PYTHONPATH": root}, cache=own / "cache")
            found[start] = json.loads(file.read_text())
        return found


Cell = Run | Slope | Step


def runs() -> list[Run]:
    """Whole runs; tools take turns within a seed, so that a slow hour of the machine hits all."""
    return [
        Run(model=model, bits=bits, data=DATA, tool=name, recipe=recipe, seed=seed)
        for seed in SEEDS
        for model, widths, left_out in RUNS
        for bits in widths
        for name, tool in TOOLS.items()
        if bits in tool.bits
        for recipe in tool.recipes
        if recipe not in left_out
    ]


def slopes() -> list[Slope]:
    """Steps a second of both tools, and how ours scale."""
    found: list[Slope] = []
    for seed in SEEDS:
        own = partial(Slope, bits=4, seed=seed, data=(32, 256), model="smollm2-blocks-1", tool=OURS)
        pace = partial(own, topic="pace", steps=(20, 420))
        found += [pace(tool=tool, bits=bits) for bits in (4, 2) for tool in (OURS, THEIRS)]
        found += [own(topic="depth", model=f"smollm2-blocks-{blocks}") for blocks in (1, 2, 4)]
        found += [own(topic="width", model=f"llama-width-{width}") for width in (384, 576, 768)]
        found += [own(topic="tokens", data=(32, seqlen)) for seqlen in (128, 256, 512)]
        found += [own(topic="cores", threads=threads) for threads in (1, 2)]
    return found


def all_cells() -> list[Cell]:
    """Every cell, in the order in which they run."""
    steps = [Step(bits=bits, seed=seed) for seed in SEEDS for bits in (4, 2)]
    return [*steps, *slopes(), *runs()]
