"""What it costs to stop a run and go on, and what keeping a journal costs a run that is never stopped.

The first blocks of SmolLM2 (dithered) are quantized by whole commands with the default recipe, compiled as it would be
for all of them: once without a stop, and once killed (SIGKILL) in the middle of a block and started again. Each of the
two begins with a cold compile cache; the run that goes on has the cache of the one that was killed.

``python -m benchmarks.resume [--blocks N] [--iters N] …`` on an idle machine: the cost is a small difference of long
times.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

from autoround.cli.main import main as auto_round
from autoround.journal import Journal
from autoround.slots import Slots
from benchmarks import machine, models
from benchmarks.cost import CACHE, QUIET

# Blocks of all of SmolLM2, for which the cost is counted too.
WHOLE = 30
CHILD = "import sys; from benchmarks.resume import timed; sys.exit(timed(sys.argv[1:]))"


class Told(NamedTuple):
    """What one command told: seconds from its start to each event, and to its end.

    Attributes:
        events: (seconds, event).
        seconds: until it ended or was killed.
    """

    events: list[tuple[float, dict[str, Any]]]
    seconds: float

    def begin(self, block: int) -> float:
        """When work on a block, from 0, began."""
        return next(at for at, event in self.events if _of(event, block) and event["step"] == 0)

    def first_step(self, block: int) -> float:
        """When the first step of a block, from 0, was done."""
        return next(at for at, event in self.events if _of(event, block) and event["step"] == 1)

    def opened(self) -> float:
        """When libraries were imported and the model was opened."""
        return next(at for at, event in self.events if event.get("phase") == "calibration")


def _of(event: dict[str, Any], block: int) -> bool:
    return event.get("phase") == "tuning" and event["block"] == block + 1


def timed(words: Sequence[str]) -> int:
    """``auto-round``, with the seconds spent writing the journal as a last line of JSON on stderr; its exit status."""
    spent = [0.0]

    def watched(write: Callable[..., None]) -> Callable[..., None]:
        @wraps(write)
        def call(*args: object) -> None:
            begun = time.monotonic()
            write(*args)
            spent[0] += time.monotonic() - begun

        return call

    Journal.write_block = watched(Journal.write_block)  # type: ignore[method-assign]
    Slots.write = watched(Slots.write)  # type: ignore[method-assign]
    status = auto_round(list(words))
    print(json.dumps({"time": time.time(), "journal": spent[0]}), file=sys.stderr)
    return status


def run(words: Sequence[str], cache: Path, kill: Callable[[dict[str, Any]], bool] | None = None) -> tuple[Told, float]:
    """One command, killed after the first event for which ``kill`` is true; and seconds spent writing the journal.

    Raises:
        RuntimeError: it failed, or ended before it was killed.
    """
    variables = os.environ | QUIET | {CACHE: str(cache)}
    command, begun, start = [sys.executable, "-c", CHILD, *words, "--log_json"], time.time(), time.monotonic()
    events, last, killed = [(0.0, dict[str, Any]())], "nothing", False
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=variables, start_new_session=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if not (last := line.strip()).startswith("{"):
                continue
            event = json.loads(last)
            events.append((event["time"] - begun, event))
            if killed := kill is not None and kill(event):
                os.killpg(process.pid, signal.SIGKILL)  # with processes that compile
                break
    journal = events[-1][1].get("journal")
    if killed != (kill is not None) or not killed and (process.returncode or journal is None):
        raise RuntimeError(f"status {process.returncode} after: {last}")
    return Told(events, time.monotonic() - start), journal or 0.0


def report(whole: Told, first: Told, second: Told, journal: float, block: int, blocks: int) -> list[str]:
    """Lines of figures.

    Args:
        whole: the run without a stop.
        first, second: the one that was killed, and the one that went on.
        journal: seconds that the run without a stop spent writing its journal.
        block: that was cut, from 0.
        blocks: of all runs.
    """
    lost = first.seconds - first.begin(block)
    cost = first.seconds + second.seconds - lost - whole.seconds
    into = whole.first_step(block) - whole.begin(block)
    again = second.first_step(block) - into
    usual = (whole.first_step(blocks - 1) - whole.first_step(1)) / (blocks - 2)
    long = whole.seconds + (WHOLE - blocks) * usual
    return [
        f"without a stop: {whole.seconds:.1f} s, of which {journal:.2f} s, {100 * journal / whole.seconds:.2f}%, are "
        "the journal's",
        f"killed after {first.seconds:.1f} s, {lost:.1f} s into block {block}; went on for {second.seconds:.1f} s",
        f"to the next step: {second.first_step(block):.1f} s, {second.first_step(block) - second.opened():.1f} s of it "
        f"after the model was opened; {into:.1f} s are what the block takes before its first step in any run",
        f"a resume costs {cost:.1f} s by the sum of both runs less what was lost, {100 * cost / whole.seconds:.1f}% "
        f"of the run; by the way to the next step {again:.1f} s, {100 * again / whole.seconds:.1f}%",
        f"of a run of {WHOLE} such blocks that would be {100 * cost / long:.1f}% or {100 * again / long:.1f}%",
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"blocks": 3, "nsamples": 128, "seqlen": 256, "iters": 120}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", type=Path, help="where models are kept; a temporary one when not given")
    options = parser.parse_args()
    if options.blocks < 3:
        parser.error(f"blocks: found {options.blocks}; needed 3 or more, of which the first waits for the compiler")
    block = options.blocks // 2
    half = max(options.iters // 2, 1)
    print(f"{machine.describe()}; " + ", ".join(f"{name} {getattr(options, name)}" for name in defaults), flush=True)
    with tempfile.TemporaryDirectory() as place:
        source = models.source(f"smollm2-blocks-{options.blocks}", options.folder or Path(place))
        words = [str(source), "--dataset", "python-docs", "--group_size", "64", "--torch_compile"]
        for name in defaults:
            words += [f"--{name}", str(getattr(options, name))] if name != "blocks" else []

        def cut(event: dict[str, Any]) -> bool:
            return _of(event, block) and event["step"] >= half

        whole, journal = run([*words, "--output_dir", f"{place}/whole"], Path(place, "cold"))
        parted = [*words, "--output_dir", f"{place}/parted"]
        first, _ = run(parted, Path(place, "kept"), cut)
        second, _ = run(parted, Path(place, "kept"))
        files = [Path(place, name, "model.safetensors").read_bytes() for name in ("whole", "parted")]
        assert files[0] == files[1], "the run that went on wrote other bytes"
    print("\n".join(report(whole, first, second, journal, block, options.blocks)))


if __name__ == "__main__":
    main()
