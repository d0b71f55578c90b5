"""Runs to be killed, each in a fork of one process that has imported everything and computed nothing.

Usage: python driver.py FOLDER, which holds ``source``, a model. Each line of stdin is an order: ``settings`` of the
recipe, and how the run is to die: ``after_block`` it finished one, ``at_point`` n of those at which it changes files,
``after_seconds``; or not at all, but with files of at most ``file_limit`` bytes. Each line of stdout is what became of
it: exit status (less than 0 where a signal ended it), seconds, points, error, and of one that is ``watched``, the most
anonymous memory that it held.

A point is what is about to be made, renamed or removed beside the output folder or in it, or the middle of a file that
is being written.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from autoround import journal
from autoround.engine import quantize
from autoround.errors import AutoRoundError
from autoround.recipe import Recipe

CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"})


class Points:
    """Counts the points of this process, and kills it at one of them."""

    def __init__(self, folder: Path, last: int | None) -> None:
        self.folder, self.last, self.seen = str(folder), last, 0
        sys.addaudithook(self._audit)
        self._save_file, journal.save_file = journal.save_file, self._save
        self._open, Path.open = Path.open, lambda path, *args, **options: self._watched(path, *args, **options)

    def pass_by(self) -> bool:
        """Whether to die here."""
        self.seen += 1
        return self.seen == self.last

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in CHANGES) and str(args[0]).startswith(self.folder) and self.pass_by():
            die()

    def _save(self, tensors: Any, path: Path, metadata: Any) -> None:
        self._save_file(tensors, path, metadata)
        if self.pass_by():
            os.truncate(path, path.stat().st_size // 2)
            die()

    def _watched(self, path: Path, *args: Any, **options: Any) -> Any:
        stream = self._open(path, *args, **options)
        if stream.writable() and str(path).startswith(self.folder):
            write = stream.write

            def half(data: Any) -> int:
                if self.pass_by():
                    write(data[: len(data) // 2])
                    stream.flush()
                    die()
                written: int = write(data)
                return written

            stream.write = half
        return stream


def die() -> None:
    """At once, with nothing flushed or cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def child(folder: Path, order: dict[str, Any], answer: int) -> None:
    """Do a run, unless it is killed."""
    torch.set_num_threads(1)
    if limit := order.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    points = Points(Path(order["settings"]["output_dir"]).parent, order.get("at_point"))
    settings = order["settings"] | {"format": tuple(order["settings"]["format"])}
    told: dict[str, Any] = {}
    peak, over = [0], threading.Event()
    watcher = threading.Thread(target=watch, args=(peak, over)) if order.get("watched") else None
    if watcher:
        watcher.start()
    try:
        run = quantize(folder / "source", Recipe(**settings))
        for done in run:
            if order.get("after_block") and not done.resumed:
                die()
        run.export()
    except AutoRoundError as error:
        told["error"] = str(error)
    if watcher:
        over.set()
        watcher.join()
    os.write(answer, json.dumps(told | {"points": points.seen, "anonymous": peak[0]}).encode())


def watch(peak: list[int], over: threading.Event) -> None:
    """The most bytes of memory that no file stands for, while a run lasts."""
    while not over.wait(0.002):
        found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        peak[0] = max(peak[0], int(found.split()[1]) * 1024)


def attempt(folder: Path, order: dict[str, Any]) -> dict[str, Any]:
    """Fork, and wait for the end, or bring it about."""
    begun, (reading, writing) = time.monotonic(), os.pipe()
    process = os.fork()
    if not process:
        status = 1
        try:
            child(folder, order, writing)
            status = 0
        except Exception:  # noqa: BLE001  a defect, told on stderr
            traceback.print_exc()
        os._exit(status)
    os.close(writing)
    if "after_seconds" in order:
        time.sleep(order["after_seconds"])
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    with os.fdopen(reading) as stream:
        told = json.loads(stream.read() or "{}")
    return {"status": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - begun, **told}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(attempt(Path(sys.argv[1]), json.loads(line))), flush=True)
