"""One of the processes that torchrun starts for the tests: does what it is ordered, one run after another.

Usage: python -m torch.distributed.run … ranked.py FOLDER ORDERS, where FOLDER holds models: ``source``, and ``three``,
which has three blocks. ORDERS is a JSON list of [kind, name, settings]; a run writes to FOLDER/name. What this rank has
to tell is in FOLDER/name.RANK.
"""

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from autoround import tuner
from autoround.cli.main import main as command
from autoround.engine import quantize, quantize_each
from autoround.errors import AutoRoundError
from autoround.recipe import Recipe
from autoround.tuner import BlockTuner
from tests.engine.small import recipe, rows

RANK = int(os.environ.get("RANK", "0"))  # without torchrun the module is only looked at


def shared_recipe(folder: Path, **settings: Any) -> Recipe:
    """Rows of several lengths, so that parts of a step have different numbers of tokens; a search for clips."""
    own = [row[: len(row) - index % 5] for index, row in enumerate(rows())]
    return recipe(folder, **{"dataset": own, "clip_search": True, "batch_size": 8} | settings)


def run(folder: Path, name: str, settings: dict[str, Any]) -> str:
    made = quantize(folder / "source", shared_recipe(folder / name, **settings))
    done = [each.resumed for each in made]
    made.export()
    return f"{done}"


def run_blocks(folder: Path, name: str, settings: dict[str, Any]) -> str:
    """Each rank tunes blocks of its own."""
    made = quantize(folder / "three", shared_recipe(folder / name, parallel="blocks", **settings))
    done = [each.resumed for each in made]
    made.export()
    return f"{done}"


def run_left(folder: Path, name: str, settings: dict[str, Any]) -> str:
    """As ``run_blocks``, left in the midst of the blocks that are tuned at the same time."""
    made = quantize(folder / "three", shared_recipe(folder / name, parallel="blocks", **settings))
    return f"{[done.path for done in islice(made, 1)]}"


def run_apart(folder: Path, name: str, settings: dict[str, Any]) -> str:
    """The ranks were told different seeds."""
    return run(folder, name, settings | {"seed": RANK})


def run_formats(folder: Path, name: str, settings: dict[str, Any]) -> str:
    """The second rank was told of a format whose grid needs a run of its own."""
    formats = ("auto_round", "fake", *("gguf:q4_0",) * RANK)
    quantize_each(folder / "source", shared_recipe(folder / name, format=formats, **settings))
    return "planned"


def run_astray(folder: Path, name: str, settings: dict[str, Any]) -> str:
    """Rank 1 finds one other code in the second block."""
    whole, blocks = tuner._quantize, iter(range(3))

    def wrong(*args: Any) -> Any:
        codes = whole(*args)
        if next(blocks) == 1 and RANK == 1:
            next(iter(codes.values())).q_OI[0, 0] ^= 1
        return codes

    tuner._quantize = wrong
    try:
        return run(folder, name, settings)
    finally:
        tuner._quantize = whole


def run_killed(folder: Path, name: str, settings: dict[str, Any]) -> str:
    """Rank 1 is killed after the second step of the second block."""
    take_steps: Callable[..., Any] = BlockTuner._take_steps
    blocks = iter(range(3))

    def die(own: Any, block_fn: Any, fusion: Any, weights: Any, params: Any, batches: Any) -> Any:
        index = next(blocks)

        def some(places: Any) -> Any:
            for step, batch in enumerate(batches(places)):
                if (RANK, index, step) == (1, 1, 2):
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        return take_steps(own, block_fn, fusion, weights, params, some)

    BlockTuner._take_steps = die  # type: ignore[method-assign]
    return run(folder, name, settings)


def run_command(folder: Path, name: str, settings: dict[str, Any]) -> str:
    """The command; what it prints."""
    del settings  # words
    words = [str(folder / "source"), "--group_size", "32", "--output_dir", str(folder / name / "out"), "--quiet"]
    with redirect_stdout(io.StringIO()) as printed:
        assert command(words, preset="rtn") == 0
    return printed.getvalue()


KINDS: dict[str, Callable[[Path, str, dict[str, Any]], str]] = {
    "run": run, "apart": run_apart, "astray": run_astray, "killed": run_killed, "command": run_command,
    "blocks": run_blocks, "left": run_left, "formats": run_formats,
}  # fmt: skip


def main(folder: Path, orders: list[tuple[str, str, dict[str, Any]]]) -> None:
    torch.set_num_threads(1)
    for kind, name, settings in orders:
        try:
            told = KINDS[kind](folder, name, settings)
        except AutoRoundError as error:
            told = f"{type(error).__name__}: {error}"
        (folder / f"{name}.{RANK}").write_text(told)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
