"""docs/benchmarks.md and its plots, from the results of ``benchmarks/bench.py``: nothing else knows the figures.

``python -m benchmarks.page`` writes them anew from ``benchmarks/results/bench.json``.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import quality
from benchmarks.peers import OURS, THEIRS, TOOLS

HEAD = """# Benchmarks

Written by `make bench` from `benchmarks/results/bench.json`; definitions of all cells are in `benchmarks/cells.py`.
Whole processes on an otherwise idle machine, compile caches cold, the same calibration rows for every tool. Figures are
medians over seeds with the smallest and the largest in brackets; peak memory is that of the process. KL divergence from
the float model, in nats per token, is judged in float32 on four domains (`benchmarks/domains.py`): means over seeds,
and differences with 95% intervals, bootstrapped over documents and paired. Two recipes are compared over the seeds that
both were run with. Each row tells the commits it was run at.
"""
# Topics of cells that tell the time of a step, and titles of their tables.
SLOPES = {
    "pace": "Steps of one block, compiled, in whole runs",
    "float32": "The same where both tools are told that the processor has no bfloat16",
    "depth": "Blocks",
    "width": "Columns",
    "tokens": "Tokens in a row",
    "cores": "Threads",
}
Group = Mapping[str, Any]


class Row(NamedTuple):
    """All seeds of one recipe of one tool.

    Attributes:
        title: tool and recipe.
        cells: seed -> result.
    """

    title: str
    cells: dict[str, Group]

    @property
    def done(self) -> list[Group]:
        """Those that did not fail."""
        return [cell for cell in self.cells.values() if "error" not in cell]

    def judged_with(self, other: "Row") -> list[Group]:
        """Those that are judged, of the seeds that the other row is judged with."""
        return [
            cell for seed, cell in self.cells.items() if "quality" in cell and "quality" in other.cells.get(seed, ())
        ]


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median, and smallest and largest in brackets where there are several."""
    text = f"{statistics.median(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def digits(value: float) -> int:
    """Decimal places of a KL divergence: four, or more where that would be fewer than three digits.

    >>> digits(1.2493), digits(0.0131), digits(0.000361)
    (4, 4, 6)
    """
    return max(4, 2 - math.floor(math.log10(max(value, 1e-12))))


def commits(cells: Sequence[Group]) -> str:
    """The commits that cells were run at, in the order of their days."""
    return ", ".join(dict.fromkeys(cell["commit"] for cell in sorted(cells, key=lambda cell: str(cell["day"]))))


def machines(cells: Sequence[Group]) -> list[str]:
    """A line for each machine and its software, with the days it ran."""
    days: dict[str, set[str]] = {}
    for cell in cells:
        days.setdefault(cell["machine"], set()).add(cell["day"])
    return [f"- {machine}; {' to '.join(sorted({min(own), max(own)}))}" for machine, own in sorted(days.items())]


def mean_scores(cells: Sequence[Group]) -> dict[str, quality.DocumentScores]:
    """Sums of documents, averaged over the seeds that are judged; empty where none is."""
    judged = [cell["quality"]["documents"] for cell in cells if "quality" in cell]
    found = {}
    for domain in sorted(judged[0]) if judged else ():  # as files have them, so that draws do not depend on the order
        fields = zip(*([own[domain][key] for key in quality.DocumentScores._fields] for own in judged), strict=True)
        found[domain] = quality.DocumentScores(*(torch.tensor(each, dtype=torch.float64).mean(0) for each in fields))
    return found


def groups(results: Group, prefix: str) -> dict[str, list[Row]]:
    """Cells of a kind by what they have in common; the last part of a name is its seed, the one before its tool."""
    found: dict[str, dict[str, Row]] = {}
    for name, cell in sorted(results.items()):
        if name.startswith(f"{prefix}/"):
            *common, row, seed = name.removeprefix(f"{prefix}/").split("/")
            found.setdefault("/".join(common), {}).setdefault(row, Row(row, {})).cells[seed] = cell
    return {key: list(rows.values()) for key, rows in found.items()}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(words)} |" for words in (head, ["---"] * len(head), *rows)]


def label(title: str) -> str:
    """A row's title for people."""
    tool, recipe = title.split(".", 1)
    return f"{TOOLS[tool].version}, {recipe}"


def judged_tokens(rows: list[Row]) -> int:
    """Predicted tokens of all domains; 0 where nothing is judged."""
    scores = next((scores for row in rows if (scores := mean_scores(row.done))), {})
    return sum(int(own.tokens_D.sum()) for own in scores.values())


def run_table(rows: list[Row]) -> list[str]:
    """Cost and quality of whole runs, with differences to ours of the same recipe, or else our default."""
    own = {row.title: row for row in rows if mean_scores(row.done)}
    lines = []
    for row in sorted(rows, key=lambda row: (row.title.split(".", 1)[1], row.title)):
        title = label(row.title)
        if not row.done:
            failed = "failed: " + next(iter(row.cells.values()))["error"].replace("|", "/")[-160:]
            lines.append([title, "", failed, *[""] * 5, commits(list(row.cells.values()))])
            continue
        costs = [cell["cost"] for cell in row.done]
        words = [title, str(len(costs)), spread([cost["seconds"] for cost in costs]),
                 f"{max(cost['gigabytes'] for cost in costs):.2f}"]  # fmt: skip
        if row.title in own:
            words += quality_cells(row, own[partner(row.title, own)])
        lines.append([*words, *[""] * (8 - len(words)), commits(row.done)])
    head = ["tool, recipe", "runs", "seconds", "GB", "KL", "docs / code / prose / model", "KL beside ours",
            "same top token", "commit"]  # fmt: skip
    return table(head, lines)


def quality_cells(row: Row, base: Row) -> list[str]:
    """Divergence over all domains and in each, how far it lies above the base's, and agreement."""
    found = quality.estimate({"own": mean_scores(row.done)})["own"]
    kl = found[quality.ALL]["kl"]
    places = digits(kl.value)
    unlike = [f"{found[domain]['kl'].value:.{places}f}" for domain in ("docs", "code", "prose", "model")
              if domain in found]  # fmt: skip
    beside = ""
    if base.title != row.title and (both := row.judged_with(base)):
        pair = {"base": mean_scores(base.judged_with(row)), "own": mean_scores(both)}
        paired = quality.estimate(pair)["own"][quality.ALL]["kl"]
        beside = "{:+.{places}f}, {:+.{places}f} to {:+.{places}f}".format(
            paired.difference, paired.low, paired.high, places=places
        )
    return [f"{kl.value:.{places}f} ± {kl.error:.{places}f}", " / ".join(unlike), beside,
            f"{found[quality.ALL]['top1'].value:.1%}"]  # fmt: skip


class Point(NamedTuple):
    """A recipe of a tool: median wall time, and mean KL divergence over its seeds."""

    title: str
    seconds: float
    kl: float

    @property
    def tool(self) -> str:
        """Its name among ``TOOLS``."""
        return self.title.split(".", 1)[0]

    @property
    def recipe(self) -> str:
        """The tool's name for it."""
        return self.title.split(".", 1)[1]

    def cells(self) -> list[str]:
        """Of a table."""
        return [label(self.title), f"{self.kl:.{digits(self.kl)}f}", f"{self.seconds:.0f}"]


def point(title: str, judged: Sequence[Group]) -> Point:
    """Of a recipe's runs that are judged."""
    kl = quality.estimate({"own": mean_scores(judged)})["own"][quality.ALL]["kl"].value
    return Point(title, statistics.median(cell["cost"]["seconds"] for cell in judged), kl)


def points(rows: Sequence[Row]) -> list[Point]:
    """All recipes that are judged."""
    return [point(row.title, own) for row in rows if (own := row.judged_with(row))]


def reach_table(rows: Sequence[Row]) -> list[str]:
    """For each recipe of another tool, our fastest one that is at least as good; empty without recipes of both.

    Both over the seeds that both are judged with.
    """
    judged = [row for row in rows if row.judged_with(row)]
    own = [row for row in judged if row.title.startswith(f"{OURS}.")]
    others = [row for row in judged if row not in own]
    lines = []
    for row in sorted(others, key=lambda row: point(row.title, row.judged_with(row)).kl):
        pairs = [(point(row.title, both), point(each.title, each.judged_with(row)), len(both))
                 for each in own if (both := row.judged_with(each))]  # fmt: skip
        reached = [pair for pair in pairs if pair[1].kl <= pair[0].kl]
        if reached:
            other, fits, seeds = min(reached, key=lambda pair: pair[1].seconds)
            lines.append([*other.cells(), *fits.cells(), f"{fits.seconds / other.seconds:.2f}", str(seeds)])
        else:
            lines.append([*point(row.title, row.judged_with(row)).cells(), "none", "", "", "", ""])
    head = ["tool, recipe", "KL", "seconds", "ours of no larger KL", "KL", "seconds", "part of the time", "seeds"]
    return table(head, lines) if own and lines else []


def partner(title: str, judged: Mapping[str, object]) -> str:
    """Our row of the same recipe; our default where we have none, and itself where that is not judged."""
    recipe = title.split(".", 1)[1].partition("+")[0]
    return next((each for each in (f"{OURS}.{recipe}", f"{OURS}.default") if each in judged), title)


def slope_table(found: Mapping[str, list[Row]]) -> list[str]:
    """Milliseconds of a step, and ratios between tools where both ran, else to the first row."""
    lines, first, compared = [], 0.0, any(row.title == THEIRS for rows in found.values() for row in rows)
    for key, rows in found.items():
        times = {row.title: [1e3 * cell["step_seconds"] for cell in row.done] for row in rows if row.done}
        middle = {tool: statistics.median(own) for tool, own in times.items()}
        first = first or middle.get(OURS, 0.0)
        shown = [spread(times[tool], 1) if tool in times else "" for tool in (OURS, THEIRS)]
        if compared:
            both = OURS in middle and THEIRS in middle
            words = [*shown, f"{middle[THEIRS] / middle[OURS]:.2f}" if both else ""]
        else:
            words = [shown[0], f"{middle[OURS] / first:.2f}" if OURS in middle else ""]
        lines.append([f"`{key}`", *words, commits([cell for row in rows for cell in row.done])])
    head = ["auto-round 0.16.1, ms a step", "ratio"] if compared else ["times the first"]
    return table(["", "autoround, ms a step", *head, "commit"], lines)


def step_table(results: Group) -> list[str]:
    """The step beside its bound."""
    lines = []
    by_name: dict[str, list[Group]] = {}
    for name, cell in sorted(results.items()):
        if name.startswith("step/") and "error" not in cell:
            by_name.setdefault(name.split("/")[1], []).append(cell)
    for key, cells in by_name.items():
        warm = [cell["warm"] for cell in cells]
        times = [spread([1e3 * own[field] for own in warm], 1) for field in ("step", "bound")]
        firsts = [spread([cell[start]["first"] for cell in cells], 1) for start in ("cold", "warm")]
        fraction, rate = spread([own["fraction"] for own in warm], 2), spread([own["square_rate"] for own in warm])
        lines.append([key, *times, fraction, rate, *firsts, commits(cells)])
    head = ["", "step, ms", "its matrix products alone, ms", "fraction", "square product, GFLOP/s",
            "first step, cold, s", "first step, warm cache, s", "commit"]  # fmt: skip
    return table(head, lines) if lines else []


def plot(title: str, rows: list[Row], file: Path) -> bool:
    """Time against KL, one curve a tool; whether there was anything to draw."""
    by_tool: dict[str, list[Point]] = {}
    for point in sorted(points(rows), key=lambda point: point.seconds):
        by_tool.setdefault(point.tool, []).append(point)
    if not by_tool:
        return False
    import matplotlib  # an extra, needed for plots alone

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "autoround"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for tool, own in by_tool.items():
        axes.plot([each.seconds for each in own], [each.kl for each in own], marker="o", label=TOOLS[tool].version)
        for each in own:
            axes.annotate(each.recipe, (each.seconds, each.kl), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="wall time, seconds", ylabel="KL, nats per token", title=title)
    axes.legend()
    axes.grid(which="both", alpha=0.3)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return True


def write(results: Group, file: Path) -> None:
    """Write the page, and its plots into a folder of the page's name beside it."""
    lines = [HEAD, *machines(list(results.values()))]
    if steps := step_table(results):
        lines += ["\n## One step and its bound\n", *steps]
    for topic, title in SLOPES.items():
        if found := groups(results, topic):
            lines += [f"\n## {title}\n", *slope_table(found)]
    for key, rows in groups(results, "run").items():
        lines += [f"\n## Whole runs: {key.replace('/', ', ')}\n", *run_table(rows)]
        lines += ["", f"Judged on {judged_tokens(rows):,} predicted tokens; runs of a recipe: one per seed."]
        if reached := reach_table(rows):
            lines += ["", *reached]
        picture = file.with_suffix("") / f"{key.replace('/', '-')}.svg"
        if plot(key.replace("/", ", "), rows, picture):
            lines += ["", f"![Time against KL divergence]({picture.relative_to(file.parent)})"]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    from benchmarks.bench import PAGE, RESULTS

    write(json.loads(RESULTS.read_text()), PAGE)
