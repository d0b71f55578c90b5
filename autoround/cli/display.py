"""What a run shows on stderr: a live bar on a terminal, plain lines elsewhere, or JSON."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from autoround.cli.json_lines import JsonLines, Others
from autoround.log import LOGGER
from autoround.progress import BlockDone, Progress


class Display(Protocol):
    """Where a run reports to."""

    def update(self, progress: Progress) -> None:
        """A moment of the run."""

    def block_done(self, done: BlockDone, blocks: int) -> None:
        """One of so many blocks is finished."""

    def note(self, text: str) -> None:
        """A line worth reading at any time."""

    def log(self, level: str, text: str) -> None:
        """What the package logs."""


class PlainDisplay:
    """A line per phase and per finished block."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last: Progress | None = None

    def update(self, progress: Progress) -> None:
        """Remember it; the begin of a phase other than tuning is a line, and so is that of an evaluation's part."""
        self._last = progress
        if progress.phase == "evaluation":
            if not progress.step:
                self.note("  ".join([progress.message, *_pace(progress)]))
        elif progress.phase == "scales" and progress.step:
            if progress.step in (1, progress.steps):
                self.note("  ".join(["scales:", *_step(progress), *_pace(progress)]))
        elif progress.phase != "tuning":
            self.note(f"{progress.phase}: {progress.message}")

    def block_done(self, done: BlockDone, blocks: int) -> None:
        """A line with what the last progress told of speed, memory and time left."""
        rest = [] if self._last is None or done.resumed else _pace(self._last)
        self.note("  ".join([_block(done, blocks), *rest]))

    def note(self, text: str) -> None:
        """A line."""
        print(text, file=self._stream, flush=True)

    def log(self, level: str, text: str) -> None:
        """A line that says whose it is."""
        self.note(_logged(level, text))


class LiveDisplay:
    """A bar that moves, under a line per finished block."""

    def __init__(self, console: Console) -> None:
        self._console = console
        name = TextColumn("{task.description}", markup=False)
        facts = TextColumn("{task.fields[facts]}", markup=False, table_column=Column(overflow="fold"))
        # Colors by name follow the terminal's theme; these two can be read on light and on dark ones.
        bar = BarColumn(20, style="bright_black", complete_style="magenta", finished_style="magenta")
        self._bar = Bar(name, bar, facts, console=console, refresh_per_second=4, transient=True)
        self._task = self._bar.add_task("", facts="")
        self._phase = ""

    def update(self, progress: Progress) -> None:
        """Move the bar; it is gone where libraries show their own: while they load and read, and after logits."""
        before, self._phase = self._phase, progress.phase
        if progress.phase == "loading" or (progress.phase == "calibration" and before != "calibration"):
            self._bar.stop()
            self.note(f"{progress.phase}: {progress.message}")
            return
        finished, total = _share(progress)
        if progress.phase == "evaluation" and finished == total:
            self._bar.stop()
            return
        self._bar.update(
            self._task,
            description=f"block {progress.block}/{progress.blocks}" if progress.phase == "tuning" else progress.phase,
            completed=finished,
            total=total,
            facts="  ".join(_step(progress)) + "\n" + "  ".join(_pace(progress)),
        )
        self._bar.start()

    def block_done(self, done: BlockDone, blocks: int) -> None:
        """A line above the bar."""
        self.note(_block(done, blocks))

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(Text(text), soft_wrap=True)

    def log(self, level: str, text: str) -> None:
        """A line above the bar that says whose it is."""
        self.note(_logged(level, text))

    def stop(self) -> None:
        """Remove the bar."""
        self._bar.stop()


@contextmanager
def display(stream: TextIO, *, json: bool = False, debug: bool = False) -> Iterator[Display]:
    """The display that suits a stream, which also shows what the package logs.

    Args:
        stream: to write to.
        json: one object a line, whatever the stream is, and for what other libraries print to stderr as well.
        debug: show all that is logged, not only warnings.
    """
    if json:
        lines = JsonLines(stream)
        with _logging(lines.log, debug=debug), redirect_stderr(Others(lines)):
            yield lines
    elif stream.isatty():
        live = LiveDisplay(Console(file=stream))
        try:
            with _logging(live.log, debug=debug):
                yield live
        finally:
            live.stop()
    else:
        plain = PlainDisplay(stream)
        with _logging(plain.log, debug=debug):
            yield plain


class _Handler(logging.Handler):
    """Passes log records on."""

    def __init__(self, log: Callable[[str, str], None]) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log(record.levelname.lower(), record.getMessage())


@contextmanager
def _logging(log: Callable[[str, str], None], *, debug: bool) -> Iterator[None]:
    """Send what the package logs, from warnings or all, to ``log``, and leave the logger as it was."""
    handler, before = _Handler(log), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.DEBUG if debug else logging.WARNING)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before)


def _logged(level: str, text: str) -> str:
    return f"auto-round: {level}: {text}"


def _block(done: BlockDone, blocks: int) -> str:
    parts = [f"block {done.index + 1}/{blocks}", done.path]
    if done.loss_first:
        parts.append(f"loss {done.loss_first:.3e} -> {done.loss_best:.3e}")
    parts.append("finished before" if done.resumed else f"{done.seconds:.1f} s")
    return "  ".join(parts)


def _share(progress: Progress) -> tuple[float, int]:
    """How much of a bar is done, and all of it."""
    if progress.phase == "tuning":
        return progress.block - 1 + progress.step / max(progress.steps, 1), progress.blocks
    if progress.steps:
        return progress.step, progress.steps
    if progress.phase == "evaluation":
        return progress.block - 1, progress.blocks
    return progress.block, progress.blocks


def _step(progress: Progress) -> list[str]:
    parts = [progress.message] if progress.message else []
    if progress.step and progress.phase in ("tuning", "scales"):
        parts.append(f"step {progress.step}/{progress.steps}")
    if progress.loss_first is not None and progress.loss is not None:
        parts.append(f"loss {progress.loss_first:.2e} -> {progress.loss:.2e}")
    return parts


def _pace(progress: Progress) -> list[str]:
    parts = [] if progress.tokens_per_second is None else [f"{progress.tokens_per_second:,.0f} tokens/s"]
    if progress.memory_bytes:
        parts.append(f"{progress.memory_bytes / 1e9:.2f} GB")
    if progress.eta_seconds is not None:
        parts.append(f"{_clock(progress.eta_seconds)} left" + f", then {progress.then}" * bool(progress.then))
    return parts


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
