"""``--log_json``: every event of a command as one JSON object a line."""

import io
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TextIO

from autoround.progress import BlockDone, Progress


class JsonLines:
    """A display whose lines are objects with "event" and "time", in seconds since 1970, and what the event tells.

    Events are progress and block, with the fields of ``Progress`` and ``BlockDone``; note, log, output (a line that
    another library printed) and error, with a text.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def update(self, progress: Progress) -> None:
        """A moment of the run."""
        self._write("progress", asdict(progress))

    def block_done(self, done: BlockDone, blocks: int) -> None:
        """One of so many blocks is finished."""
        self._write("block", {"blocks": blocks, **asdict(done)})

    def note(self, text: str) -> None:
        """A line worth reading at any time."""
        self._write("note", {"text": text})

    def log(self, level: str, text: str) -> None:
        """What the package logs."""
        self._write("log", {"level": level, "text": text})

    def output(self, text: str) -> None:
        """A line that another library printed."""
        self._write("output", {"text": text})

    def error(self, text: str, exit_status: int) -> None:
        """The last line of a command that fails."""
        self._write("error", {"text": text, "exit_status": exit_status})

    def _write(self, event: str, fields: Mapping[str, Any]) -> None:
        told = {"event": event, "time": round(time.time(), 3)}
        told |= {name: None if _endless(value) else value for name, value in fields.items()}
        print(json.dumps(told, ensure_ascii=False), file=self._stream, flush=True)


class Others(io.TextIOBase):
    """Takes the place of stderr: lines of other libraries become events, and bars that redraw themselves their end."""

    def __init__(self, lines: JsonLines) -> None:
        self._lines, self._rest = lines, ""

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str) -> int:
        """Keep text until its line ends."""
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            if kept := line.rstrip("\r").rpartition("\r")[2].strip():
                self._lines.output(kept)
        self._rest = self._rest[self._rest.rfind("\r") + 1 :]
        return len(text)


def _endless(value: object) -> bool:
    """Whether JSON has no such number."""
    return isinstance(value, float) and not math.isfinite(value)
