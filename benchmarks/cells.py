"""The cells of the benchmark: what is run once, alone, and kept as one JSON file. They are those that the page shows.

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
# Models, bits, seeds and tools' recipes: with every seed what goals compare, the others once.
RUNS: tuple[tuple[str, int, tuple[int, ...], dict[str, str]], ...] = (
    ("small-llama", 4, SEEDS, {
        OURS: "default light rtn opt_rtn 25-steps", THEIRS: "default light rtn opt_rtn", "gptqmodel": "gptq",
        "llm-compressor": "gptq autoround"}),
    ("smollm2-dithered", 4, SEEDS, {
        OURS: "opt_rtn opt_rtn+24-scale-steps opt_rtn+32-scale-steps 25-steps 28-steps 30-steps",
        THEIRS: "opt_rtn light default"}),
    ("smollm2-dithered", 4, SEEDS[:1], {
        OURS: "default light rtn 20-steps opt_rtn+64-scale-steps", THEIRS: "rtn", "gptqmodel": "gptq",
        "llm-compressor": "gptq autoround"}),
    ("smollm2-dithered", 2, SEEDS, {OURS: "opt_rtn opt_rtn+32-scale-steps", THEIRS: "opt_rtn light default"}),
    ("smollm2-dithered", 2, SEEDS[:1], {
        OURS: "default light rtn 25-steps opt_rtn+48-scale-steps opt_rtn+64-scale-steps light+64-scale-steps",
        THEIRS: "rtn", "gptqmodel": "gptq", "llm-compressor": "gptq"}),
)  # fmt: skip


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
        recipe: the tool's name for it.
        steps: of both runs; so many more that seconds of compiling more or less do not count.
        threads: None leaves the tools their own choice.
    """

    topic: str
    model: str
    bits: int
    data: tuple[int, int]
    tool: str
    seed: int
    recipe: str = "default"
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
            costs.append(measure(tool.recipes[self.recipe](job), part / "log.txt", variables))
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
        Run(model=model, bits=bits, data=DATA, tool=tool, recipe=recipe, seed=seed)
        for seed in SEEDS
        for model, bits, seeds, tools in RUNS
        if seed in seeds
        for tool, recipes in tools.items()
        for recipe in recipes.split()
    ]


def slopes() -> list[Slope]:
    """Steps a second of both tools with every seed, and how ours scale."""
    own = partial(Slope, bits=4, seed=0, data=(32, 256), model="smollm2-blocks-1", tool=OURS)
    pace = partial(own, topic="pace", steps=(20, 420))
    return [
        *(pace(tool=tool, bits=bits, seed=seed) for seed in SEEDS for bits in (4, 2) for tool in (OURS, THEIRS)),
        *(own(topic="float32", tool=tool, recipe="float32") for tool in (OURS, THEIRS)),
        *(own(topic="depth", model=f"smollm2-blocks-{blocks}") for blocks in (1, 2, 4)),
        *(own(topic="width", model=f"llama-width-{width}") for width in (384, 576, 768)),
        *(own(topic="tokens", data=(32, seqlen)) for seqlen in (128, 256, 512)),
        *(own(topic="cores", threads=threads) for threads in (1, 2)),
    ]


def all_cells() -> list[Cell]:
    """Every cell, in the order in which they run."""
    steps = [Step(bits=bits, seed=seed) for seed in SEEDS for bits in (4, 2)]
    return [*steps, *slopes(), *runs()]
