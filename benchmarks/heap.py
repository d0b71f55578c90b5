"""Peak memory of a tuned run, and of ways to have less of it.

``python -m benchmarks.heap [WAY …] [--iters N] [--bits N]`` tunes the first two blocks of SmolLM2 (dithered), 128 rows
of 256 tokens, compiled, each way in a process of its own with a cold compile cache. Printed are the most resident and
anonymous memory of the process, and seconds of the second block.
"""

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks import machine
from benchmarks.cells import DATA, Place
from benchmarks.cost import measure

MODEL, GROUP_SIZE = "smollm2-blocks-2", 64
SECONDS = 2.0


class Way(NamedTuple):
    """How the heap is kept.

    Attributes:
        title: for the table.
        variables: of the environment.
        mapped: bytes from which on a tensor is mapped by itself; None is the command's own choice.
        often: what is done every other second.
        first: what is done when the first block is done.
    """

    title: str
    variables: Mapping[str, str] = {}
    mapped: int | None = None
    often: Callable[[], None] = lambda: None
    first: Callable[[], None] = lambda: None


def trim() -> None:
    """Of what is free between two live pieces."""
    from autoround.backends.host import trim_heap

    trim_heap()


def clear() -> None:
    """Caches that compiling filled."""
    import sympy.core.cache
    from torch._inductor.utils import clear_caches

    clear_caches()
    sympy.core.cache.clear_cache()
    gc.collect()
    trim()


WAYS = {
    "now": Way("as the command does"),
    "arena": Way("one arena for all threads", variables={"MALLOC_ARENA_MAX": "1"}),
    "mapped": Way("tensors mapped from 4 MiB on, not 8", mapped=2**22),
    "trimmed": Way("heap trimmed every 2 s", often=trim),
    "cleared": Way("the compiler's caches cleared after the first block", first=clear),
    "arena-trimmed": Way("one arena, trimmed every 2 s", variables={"MALLOC_ARENA_MAX": "1"}, often=trim),
}


def tune(way: Way, options: argparse.Namespace) -> float:
    """Tune in this process; seconds of the second block."""
    from autoround.backends import host
    from autoround.cli.session import CACHES

    os.environ.update(CACHES)
    if way.mapped is not None:
        host.MAPPED_BYTES = way.mapped
    host.settle_heap()
    from autoround.engine import quantize
    from autoround.recipe import Recipe

    rows, seqlen = DATA
    place = Place(folder=options.folder)
    job = place.job(MODEL, options.output, bits=options.bits, data=DATA, seed=0, iters=None)
    recipe = Recipe(
        model=str(job.source), bits=options.bits, group_size=GROUP_SIZE, dataset=f"{job.texts}:concat=False",
        nsamples=rows, seqlen=seqlen, iters=options.iters, batch_size=8, device_map="cpu", torch_compile=True,
        output_dir=str(options.output))  # fmt: skip
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(SECONDS):
            way.often()

    threading.Thread(target=keep, daemon=True).start()
    times: list[float] = []
    for _ in quantize(str(job.source), recipe):
        if not times:
            way.first()
        times.append(time.perf_counter())
    ended.set()
    return times[1] - times[0]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Options from the command line, or from words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", choices=[*WAYS, []], help="all of them by default")
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "autoround-bench")
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.ways = options.ways or list(WAYS)
    return options


def compare(options: argparse.Namespace) -> None:
    """Run each way in its own process and print a table."""
    print(machine.describe())
    print(f"SmolLM2 (dithered), 2 blocks, {options.bits} bits in groups of {GROUP_SIZE}, {options.iters} steps")
    print("| way | resident, GB | anonymous, GB | second block, s |")
    print("|---|---|---|---|", flush=True)
    words = [f"--{name}={getattr(options, name)}" for name in ("bits", "iters")]
    words.append(f"--folder={options.folder.resolve()}")
    for name in options.ways:
        way = WAYS[name]
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log.txt"
            command = [sys.executable, "-m", "benchmarks.heap", name, *words, f"--output={folder}/out"]
            cost = measure(command, log, {"PYTHONPATH": str(Path(__file__).parents[1]), **way.variables})
            seconds = float(log.read_text().strip().splitlines()[-1])
        own = f"{cost.gigabytes:.2f} | {cost.anonymous_gigabytes:.2f} | {seconds:.1f}"
        print(f"| {way.title} | {own} |", flush=True)


def main() -> None:
    """Compare ways, or be the process of one."""
    options = parse()
    if options.output is None:
        compare(options)
    else:
        print(tune(WAYS[options.ways[0]], options))


if __name__ == "__main__":
    main()
