"""``auto-round list``: names that a command line takes."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from autoround.cli.grammar import Grammar
from autoround.cli.session import terminal_width
from autoround.data.language import did_you_mean
from autoround.errors import UsageError
from autoround.tables import aligned, fold

# Rows of equal length, of which the first is the head, and lines below them.
Table: TypeAlias = tuple[list[tuple[str, ...]], list[str]]
GRAMMAR = Grammar(
    program="auto-round list",
    usage="formats|schemes|datasets|recipes",
    description="Print the names that --format, --scheme and --dataset take, and the recipes of the commands.",
    positional=("WHAT", "formats, schemes, datasets or recipes"),
    needed="formats, schemes, datasets or recipes",
    settings={},
    switches=(),
)


def run(values: Mapping[str, Any]) -> str:
    """The table of what was asked for.

    Raises:
        UsageError: nothing of that name can be listed.
    """
    what = str(values.get("positional", ""))
    what = f"{what}s" if f"{what}s" in TABLES else what
    if what not in TABLES:
        raise UsageError(f"list: found {what!r}; needed one of {', '.join(TABLES)}{did_you_mean(what, TABLES)}")
    rows, below = TABLES[what]()
    return "\n".join([*aligned(rows, terminal_width()), "", *below])


def _formats() -> Table:
    from autoround.formats.gguf.recipes import FILE_TYPES
    from autoround.formats.registry import available, rules

    rows: list[tuple[str, ...]] = [("format", "bits", "mixed", "head", "group sizes")]
    for name in available():
        each = rules(name)
        if each.file_type:
            continue
        sizes = ", ".join(map(str, each.group_sizes)) if each.group_sizes else f"multiples of {each.multiple}"
        bits = ", ".join(map(str, each.bits))
        rows.append((name, bits, _yes(each.mixed), _yes(each.head), "any" if each.any_grid else sizes))
    return rows, fold(", ".join(f"gguf:{name}" for name in FILE_TYPES), terminal_width() or 80)


def _schemes() -> Table:
    from autoround.spec import QuantSpec

    rows: list[tuple[str, ...]] = [("scheme", "bits", "group size", "grid")]
    for name in ("W2A16", "W3A16", "W4A16", "W8A16", "W2A16G32", "W2A16G64", "W4A16G32_ASYM"):
        spec = QuantSpec.parse(name)
        rows.append((name, str(spec.bits), str(spec.group_size), "symmetric" if spec.sym else "asymmetric"))
    return rows, ["W<2|3|4|8>A16, then G<group size> and _ASYM as wanted; GGUF types are formats"]


def _datasets() -> Table:
    from autoround.data.hub_names import SHORT_NAMES

    rows: list[tuple[str, ...]] = [("dataset", "where", "what is read")]
    rows.append(("python-docs", "this machine", "the standard library's reference and docstrings"))
    rows.append(("self", "this machine", "rows that the model writes itself"))
    for name, known in SHORT_NAMES.items():
        parts = [*([known.config] if known.config else []), "+".join(known.splits), "streamed" if known.stream else ""]
        rows.append((name, known.repo, ", ".join(filter(None, parts))))
    return rows, ["any file, folder, glob or hub name works too: auto-round data --help"]


def _recipes() -> Table:
    from autoround.cli.quantize import program
    from autoround.recipe import PRESETS, Recipe

    rows: list[tuple[str, ...]] = [("command", "steps", "rows", "tokens a row", "learning rate", "clip search")]
    for name in PRESETS:
        each = Recipe.preset(name)
        data = (str(each.nsamples), str(each.seqlen)) if each.needs_data else ("none", "none")
        rate = f"{each.learning_rate(4):g}" if each.iters else ""
        rows.append((program(name), str(each.iters), *data, rate, _yes(each.searches_clips)))
    return rows, ["auto-round --help has the flags that win over them"]


TABLES: Mapping[str, Callable[[], Table]] = MappingProxyType(
    {"formats": _formats, "schemes": _schemes, "datasets": _datasets, "recipes": _recipes}
)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
