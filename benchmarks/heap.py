"""Peak memory of a tuned run and the time of its steps, by what the allocator keeps.

``python -m benchmarks.heap [WAY …] [--iters N] [--bits N]`` tunes the first two blocks of SmolLM2 (dithered), 128 rows
of 256 tokens, compiled, each way in a process of its own with a cold compile cache. Printed are the most resident and
anonymous memory of the process, and seconds of the second block.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks import machine
from benchmarks.cells import DATA, Place
from benchmarks.cost import measure

MODEL, GROUP_SIZE = "smollm2-blocks-2", 64


class Way(NamedTuple):
    """How the heap is kept.

    Attributes:
        title: for the table.
        variables: of the environment.
        settings: names of ``autoround.backends.host`` and ``autoround.tuner`` -> values in place of theirs.
    """

    title: str
    variables: Mapping[str, str] = {}
    settings: Mapping[str, int] = {}


NEVER = 10**9
WAYS = {
    "now": Way("as the command does: trimmed every 10 steps, 128 MiB kept free at the end"),
    "kept-64": Way("64 MiB kept", settings={"KEPT_BYTES": 2**26}),
    "kept-512": Way("512 MiB kept", settings={"KEPT_BYTES": 2**29}),
    "rarely": Way("trimmed every 50 steps", settings={"TRIMMED_STEPS": 50}),
    "never": Way("never trimmed, 512 MiB kept", settings={"TRIMMED_STEPS": NEVER, "KEPT_BYTES": 2**29}),
    "mapped-4": Way("tensors mapped from 4 MiB on, not 8", settings={"MAPPED_BYTES": 2**22}),
    "mapped-32": Way("tensors mapped from 32 MiB on", settings={"MAPPED_BYTES": 2**25}),
    "huge": Way("pages of 2 MiB", variables={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
    "arena": Way("one arena for all threads", variables={"MALLOC_ARENA_MAX": "1"}),
}


def set_up(way: Way) -> None:
    """Before anything takes memory."""
    from autoround import scales, tuner
    from autoround.backends import host

    for name, value in way.settings.items():
        for module in (host, tuner, scales):
            if hasattr(module, name):
                setattr(module, name, value)
    host.settle_heap()


def tune(way: Way, options: argparse.Namespace) -> float:
    """Tune in this process; seconds of the second block."""
    from autoround.cli.session import CACHES

    os.environ.update(CACHES)
    set_up(way)
    from autoround.engine import quantize
    from autoround.recipe import Recipe

    rows, seqlen = DATA
    place = Place(folder=options.folder)
    job = place.job(MODEL, options.output, bits=options.bits, data=DATA, seed=0, iters=None)
    recipe = Recipe(
        model=str(job.source), bits=options.bits, group_size=GROUP_SIZE, dataset=f"{job.texts}:concat=False",
        nsamples=rows, seqlen=seqlen, iters=options.iters, batch_size=8, device_map="cpu", torch_compile=True,
        output_dir=str(options.output))  # fmt: skip
    times: list[float] = []
    for _ in quantize(str(job.source), recipe):
        times.append(time.perf_counter())
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
