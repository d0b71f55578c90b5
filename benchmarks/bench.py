"""Every figure of docs/benchmarks.md: ``make bench``, or ``python -m benchmarks.bench [--cells PATTERN …] [--list]``.

Cells run one after the other on an idle machine, whole processes with cold compile caches. A cell that is done is a
JSON file in ``FOLDER/cells`` and is not run again: the same command goes on where it stopped; remove the folder of a
cell to run it anew. Then all new checkpoints are judged, some of one model at a time, and the results are laid over
those of ``benchmarks/results/bench.json``, from which the page is made. A tool that fails stays in the table with its
error, and so does a checkpoint that cannot be judged. Scores on other text than the newest ones of the same model, bits
and data are left out, since they do not compare.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from autoround.errors import AutoRoundError
from benchmarks import cells, domains, machine, models, page, quality
from benchmarks.cells import Cell, Place
from benchmarks.cost import Failed

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "bench.json", ROOT / "docs" / "benchmarks.md"
RESULT, QUALITY = "result.json", "quality.json"
# Predicted tokens of the judge over all domains; one checkpoint of SmolLM2, whose vocabulary is large, takes 150 s.
TOKENS = 52_000
# Checkpoints that are in memory together while they are judged.
TOGETHER = 8


def select(patterns: Sequence[str], found: Iterable[Cell]) -> list[Cell]:
    """Cells whose name one of the patterns of ``fnmatch`` matches; all without patterns.

    Raises:
        SystemExit: a pattern that matches none.
    """
    own = list(found)
    for pattern in patterns:
        if not any(fnmatchcase(cell.name, pattern) for cell in own):
            raise SystemExit(f"--cells {pattern}: found no such cell; needed a pattern of names; see --list")
    return [cell for cell in own if not patterns or any(fnmatchcase(cell.name, pattern) for pattern in patterns)]


def run_cell(cell: Cell, place: Place) -> None:
    """Run a cell from the beginning and keep what it found, or its error."""
    folder = place.of(cell.name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        found = cell.measure(place)
    except (Failed, FileNotFoundError) as error:
        found = {"error": str(error).replace(str(place.folder.resolve()), "")}
    write(folder / RESULT, found | about())


def about() -> dict[str, Any]:
    """What figures are kept with: machine, commit and day."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    day = datetime.now(timezone.utc).date().isoformat()
    return {"machine": machine.describe(), "commit": commit.stdout.strip(), "day": day}


def write(file: Path, found: dict[str, Any]) -> None:
    """As JSON, all of it or nothing."""
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(found))
    unfinished.replace(file)


def judge_all(chosen: Sequence[Cell], place: Place, *, tokens: int) -> None:
    """Judge whole runs that are not yet judged on so many tokens; in float32, in which packed layers are exact."""
    waiting: dict[str, list[tuple[Path, str]]] = {}
    for cell in chosen:
        folder = place.of(cell.name)
        if isinstance(cell, cells.Run) and (folder / RESULT).exists() and not judged(folder, tokens):
            checkpoint = json.loads((folder / RESULT).read_text()).get("checkpoint")
            if checkpoint:
                waiting.setdefault(cell.model, []).append((folder, checkpoint))
    for model, own in waiting.items():
        reference = models.source(model, place.folder / "models")
        for start in range(0, len(own), TOGETHER):
            part = own[start : start + TOGETHER]
            print(f"judging {len(part)} of {model}, {start + len(part)} of {len(own)}", flush=True)
            judge(reference, part, tokens)


def judged(folder: Path, tokens: int) -> bool:
    """Whether a cell has scores on so many tokens."""
    return (folder / QUALITY).exists() and json.loads((folder / QUALITY).read_text()).get("tokens") == tokens


def judge(reference: Path, part: Sequence[tuple[Path, str]], tokens: int) -> None:
    """Judge checkpoints of one model together, or each alone where one of them cannot be read."""
    try:
        scores = quality.score_checkpoints(
            reference, [path for _, path in part], tokens=tokens, names=domains.DOMAINS, dtype=torch.float32
        )
    except AutoRoundError as error:
        for each in part if len(part) > 1 else ():
            judge(reference, [each], tokens)
        if len(part) == 1:
            file = part[0][0] / RESULT
            write(file, json.loads(file.read_text()) | {"error": str(error)})
        return
    for folder, path in part:
        sums = quality.as_json({quality.FLOAT: scores[quality.FLOAT], path: scores[path]})["documents"]
        write(folder / QUALITY, {"tokens": tokens, "float": sums[quality.FLOAT], "documents": sums[path]})


def collect(place: Place, results: Path) -> dict[str, Any]:
    """Results of all cells, those in the folder laid over those of earlier benchmarks; also written."""
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    for cell in cells.all_cells():
        folder = place.of(cell.name)
        if (folder / RESULT).exists():
            own = json.loads((folder / RESULT).read_text())
            own.pop("checkpoint", None)
            if (folder / QUALITY).exists():
                own["quality"] = json.loads((folder / QUALITY).read_text())
            found[cell.name] = own
    for name in unlike(found, place):
        print(f"{name}: judged on other text than the newest beside it; its scores are left out", flush=True)
        del found[name]["quality"]
    lines = (f"{json.dumps(name)}: {json.dumps(found[name], sort_keys=True)}" for name in sorted(found))
    results.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return found


def unlike(found: Mapping[str, Any], place: Place) -> list[str]:
    """Cells judged on other documents than those in the folder, or than the newest, of their model, bits and data."""
    texts: dict[str, dict[str, Any]] = {}
    for name, cell in found.items():
        if "quality" in cell:
            texts.setdefault(name.rsplit("/", 2)[0], {})[name] = {
                domain: own["tokens_D"] for domain, own in cell["quality"]["documents"].items()
            }
    wrong = []
    for own in texts.values():
        newest = max(own, key=lambda name: ((place.of(name) / QUALITY).exists(), found[name]["day"]))
        wrong += [name for name, documents in own.items() if documents != own[newest]]
    return wrong


def main() -> None:
    """Parse options; run, judge, collect and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=[], metavar="PATTERN", help="names as in --list; * is anything")
    parser.add_argument("--list", action="store_true", help="print the cells and which are done, then stop")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "autoround-bench",
                        help="for models, cells and checkpoints")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=TOKENS, help="predicted ones, over all domains of the judge")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    place, chosen = Place(folder=options.folder), select(options.cells, cells.all_cells())
    for number, cell in enumerate(chosen, 1):
        done = (place.of(cell.name) / RESULT).exists()
        if options.list:
            print(f"{'done' if done else '    '} {cell.name}")
        elif not done:
            print(f"{number}/{len(chosen)} {cell.name}", flush=True)
            run_cell(cell, place)
    if not options.list:
        judge_all(chosen, place, tokens=options.tokens)
        page.write(collect(place, options.results), options.page)


if __name__ == "__main__":
    main()
