"""``auto-round plan`` and ``--dry-run``: what a run would need, as text or as JSON."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from autoround.cli.show import show_plan
from autoround.recipe import Recipe

if TYPE_CHECKING:
    from autoround.forecast.types import Forecast, Memory, Seconds


class Foretell(Protocol):
    """Says what the runs of a recipe need: see ``autoround.forecast.foretell.foretell``."""

    def __call__(self, recipe: Recipe, *, probe: bool = True) -> "Sequence[Forecast]": ...


def foretold(recipe: Recipe, *, probe: bool, json: bool, foretell: Foretell | None = None) -> str:
    """What stdout shows of a recipe that is not run.

    Args:
        recipe: all settings.
        probe: time a block.
        json: one JSON object a run in place of text.
        foretell: says what is needed; the package's own when not given.

    Raises:
        AutoRoundError: whatever would make the run fail later and can be known now.
    """
    forecasts = (foretell or _foretell())(recipe, probe=probe)
    if json:
        return "\n".join(map(as_json, forecasts))
    return "\n\n".join(as_text(each, several=len(forecasts) > 1) for each in forecasts)


def as_text(forecast: "Forecast", *, several: bool = False) -> str:
    """Lines of at most 80 columns, but for long paths: fates, memory, files, disk, time, and whether it fits.

    Args:
        forecast: of one run.
        several: name its formats, where a command has several runs.
    """
    lines = [show_plan(forecast.plan, ", ".join(forecast.formats) if several else ""), ""]
    lines += [f"memory ({forecast.numerics})", *_memory(forecast.memory), "", "weight files, in bytes"]
    for name, sizes in forecast.files.items():
        lines += [f"  {name:14} {size:>17,}  {file}" for file, size in _folded(sizes)]
        if len(sizes) > 1:
            lines += [f"  {'':14} {sum(sizes.values()):>17,}  in all"]
    lines += ["", f"disk        {readable(forecast.disk)} at most, with the journal"]
    if forecast.seconds is not None:
        lines += [f"time        {_time(forecast.seconds)}"]
    return "\n".join([*lines, *_verdict(forecast)])


def as_json(forecast: "Forecast") -> str:
    """One line with all fields; the plan as path -> spec, or why a layer is kept."""
    told: dict[str, Any] = {name: value for name, value in asdict(forecast).items() if name != "plan"}
    told["layers"] = {path: str(layer.spec or layer.reason) for path, layer in forecast.plan.layers.items()}
    return json.dumps({"event": "plan", "fits": not forecast.shortages, **told}, ensure_ascii=False)


def readable(size: float) -> str:
    """Bytes in powers of ten.

    >>> readable(1_530_000_000), readable(999_700_000), readable(999)
    ('1.53 GB', '1 GB', '999 B')
    """
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.9995 * factor:  # less is shown in three digits of the next unit
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"


def _memory(memory: "Memory") -> Iterator[str]:
    peak = f"  {'peak':22} {readable(memory.host):>8}"
    yield peak + (f" host, {readable(memory.device)} device" if memory.device else "")
    yield f"  {'process':22} {readable(memory.process):>8}"
    yield f"  {'activations':22} {readable(memory.activations):>8}"
    yield f"  {'outside the blocks':22} {readable(memory.others):>8}"
    for need in memory.blocks:
        device = f" host, {readable(need.device)} device" if need.device else ""
        yield f"  {f'each of {len(need.paths)} blocks':22} {readable(need.host):>8}{device}  {_span(need.paths)}"


def _span(paths: Sequence[str]) -> str:
    """The first path and how it goes on."""
    return paths[0] if len(paths) == 1 else f"{paths[0]}, …"


def _folded(sizes: "dict[str, int] | Any") -> list[tuple[str, int]]:
    """Files and sizes; of many shards the first and the last ones."""
    files = list(sizes.items())
    return files if len(files) <= 5 else [*files[:2], *files[-2:]]


def _time(seconds: "Seconds") -> str:
    parts = [f"{_span_of_time(seconds.block)} a block"]
    if seconds.step:
        parts += [f"{seconds.step:.2g} s a step"]
    if seconds.compiling:
        parts += [f"{seconds.compiling:.0f} s compiling"]
    return f"about {_span_of_time(seconds.total)} ({', '.join(parts)})"


def _span_of_time(seconds: float) -> str:
    """Rounded as an estimate may be."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _verdict(forecast: "Forecast") -> Iterator[str]:
    room, short = forecast.room, {each.what for each in forecast.shortages}
    if not short:
        device = f", {readable(room.device)} of the device" if room.device else ""
        yield f"fits        yes: {readable(room.host)} of memory free{device}, {readable(room.disk)} of disk"
    for each in forecast.shortages:
        limit = f" ({room.host_limit})" if each.what == "memory" else ""
        yield f"fits        no: {each.what}: needs {readable(each.needed)}, has {readable(each.free)}{limit}"
        yield f"            use {' '.join(each.flags)}" if each.flags else "            no flag would make it fit"


def _foretell() -> Foretell:
    from autoround.forecast.foretell import foretell

    return foretell
