"""A run to be killed: tells every event on a line and goes on when it is answered.

Usage: python interrupted.py FOLDER, which holds ``source`` (a model) and ``recipe.json``.
"""

import json
import sys
import time
from pathlib import Path

from autoround.engine import quantize
from autoround.progress import REPORT_SECONDS, Progress
from autoround.recipe import Recipe


def tell(event: str) -> None:
    print(event, flush=True)
    sys.stdin.readline()


def watch(progress: Progress) -> None:
    if progress.step:
        tell(f"block {progress.block - 1} step {progress.step}")
        time.sleep(REPORT_SECONDS)  # so that the next step is reported too


def main(folder: Path) -> None:
    settings = json.loads((folder / "recipe.json").read_text())
    settings["format"] = tuple(settings["format"])
    run = quantize(folder / "source", Recipe(**settings), on_progress=watch)
    for done in run:
        tell(f"block {done.index} {'resumed' if done.resumed else 'done'}")
    run.export()
    tell("exported")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
