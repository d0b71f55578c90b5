"""What a command will need: each run planned by headers alone, counted and timed, and held against the machine."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from autoround.backends.base import select_all
from autoround.backends.products import float32_products
from autoround.engine import Run
from autoround.export import Target, weight_files
from autoround.families import split
from autoround.forecast.blank import BlankRun, blank
from autoround.forecast.machine import room
from autoround.forecast.memory import memory_of
from autoround.forecast.probe import seconds_of
from autoround.forecast.types import Forecast, Memory, Room, Shortage
from autoround.model.load import OpenModel, open_headers
from autoround.recipe import Recipe

# To what each setting may be lowered: less text makes a calibration that is hardly one.
LEAST = {"nsamples": 64, "seqlen": 512}


def foretell(recipe: Recipe, *, probe: bool = True) -> tuple[Forecast, ...]:
    """Plan each run of a recipe without reading a weight, and say what it needs.

    Args:
        recipe: all settings, the model among them.
        probe: time a block, which takes a second or a few.

    Raises:
        AutoRoundError: whatever would make the run fail later and can be known now.
    """
    model = open_headers(
        recipe.model,
        revision=recipe.revision,
        cache_dir=recipe.cache_dir,
        token=recipe.token,
        trust_remote_code=recipe.trust_remote_code,
    )
    process = _process_bytes()
    return tuple(_forecast(model, each, process, probe=probe) for each in split(recipe))


def _process_bytes() -> int:
    """Resident memory of this process: what a run starts with."""
    return int(psutil.Process().memory_info().rss)


def _forecast(model: OpenModel, recipe: Recipe, process: int, *, probe: bool) -> Forecast:
    run = Run(model, recipe)
    bare = blank(run)
    files, memory, free = (
        weight_files(run.model, run.plan, _target(recipe)),
        memory_of(bare, process),
        room(Path(recipe.output_dir), run.device),
    )
    written = sum(sum(sizes.values()) for sizes in files.values())
    disk = _disk(bare, memory, written)
    numerics = run.numerics
    with float32_products(run.device):  # as the run has them
        seconds = seconds_of(bare, written) if probe else None
    words = f"{numerics.device}, {numerics.dtype}, {numerics.attention} attention, activations {run.place}, "
    return Forecast(
        plan=run.plan,
        formats=recipe.format,
        numerics=words + ("compiled steps" if numerics.compiler else "uncompiled steps") + _alone(recipe),
        files=files,
        memory=memory,
        disk=disk,
        seconds=seconds,
        room=free,
        shortages=tuple(_shortages(bare, memory, disk, free)),
    )


def _alone(recipe: Recipe) -> str:
    """What is not counted where a run has several devices: blocks that are spread take less of the first one."""
    _, devices = select_all(recipe.device_map)
    return ", counted as if the first device did all of it" if len(devices) > 1 else ""


def _target(recipe: Recipe) -> Target:
    return Target(
        folder=Path(recipe.output_dir),
        formats=recipe.format,
        dtype=recipe.model_dtype,
        max_shard_size=recipe.max_shard_size,
    )


def _disk(bare: BlankRun, memory: Memory, written: int) -> int:
    """The journal's codes, with two slots of activations while blocks are tuned or all files afterwards."""
    codes = sum(len(block.paths) * block.codes for block in memory.blocks) + memory.outside_codes
    return codes + max(memory.slots, written)


def _shortages(bare: BlankRun, memory: Memory, disk: int, free: Room) -> Iterator[Shortage]:
    """What does not fit, with flags that make it fit."""
    if memory.host > free.host:
        yield Shortage(what="memory", needed=memory.host, free=free.host, flags=_flags(bare, free, memory.process))
    if free.device is not None and memory.device > free.device:
        yield Shortage(
            what="device memory", needed=memory.device, free=free.device, flags=_flags(bare, free, memory.process)
        )
    if disk > free.disk:
        yield Shortage(what="disk", needed=disk, free=free.disk, flags=("--output_dir on another disk",))


def _flags(bare: BlankRun, free: Room, process: int) -> tuple[str, ...]:
    """The first of some settings with which host and device suffice, each tried together with those before it.

    Those that leave the result as it is come first: where activations are kept, and how a step is divided; then less
    text.
    """
    given: dict[str, Any] = {}
    for settings in _remedies(bare.run.recipe, accelerated=bare.run.device.type != "cpu"):
        given |= settings
        memory = memory_of(_again(bare, given), process)
        if memory.host <= free.host and (free.device is None or memory.device <= free.device):
            return tuple(f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items())
    return ()


def _remedies(recipe: Recipe, *, accelerated: bool) -> Iterator[dict[str, Any]]:
    """Settings that save memory."""
    if accelerated and not recipe.low_gpu_mem_usage:
        yield {"low_gpu_mem_usage": True}
    rows, parts = recipe.batch_size, recipe.gradient_accumulate_steps
    while rows % 2 == 0:
        rows, parts = rows // 2, parts * 2
        yield {"batch_size": rows, "gradient_accumulate_steps": parts}
    if recipe.needs_data and recipe.activations != "disk":
        yield {"activations": "disk"}
    for name, least in LEAST.items():
        value = getattr(recipe, name) // 2
        while value >= least:
            yield {name: value}
            value //= 2


def _again(bare: BlankRun, given: dict[str, Any]) -> BlankRun:
    """The same run with other settings."""
    recipe = dataclasses.replace(bare.run.recipe, **given)
    return blank(Run(bare.run.model, recipe))
