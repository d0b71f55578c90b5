"""Whether rounding to nearest is bound by its files: a whole command beside what its files alone take.

A Llama with random weights (``benchmarks/limited.py``) is quantized by ``auto-round-rtn``. Beside that, a plain loop
does with files of the same sizes what a run that keeps a journal and verifies its output cannot do without: read the
source and take its checksum, write and sync the journal with its checksum, read it, write and sync the output, read it.
Rounds of both alternate.

``python -m benchmarks.rtn [--hidden N] [--blocks N] [--rounds N] [--folder FOLDER]`` on an idle machine.
"""

import argparse
import dataclasses
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks import machine
from benchmarks.cost import measure
from benchmarks.limited import make_job, make_model
from benchmarks.peers import OURS, TOOLS

PIECE = 2**24


def size_of(folder: Path) -> int:
    """Bytes of the weights in a folder, or in those below it."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def read(files: Iterable[Path], *, checked: bool) -> None:
    """Read files in pieces, and take their checksum."""
    checksum = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while piece := opened.read(PIECE):
                if checked:
                    checksum.update(piece)


def write(file: Path, count: int, *, checked: bool) -> None:
    """Write so many bytes, take their checksum, and wait until they are on the disk."""
    checksum, piece = hashlib.sha256(), os.urandom(PIECE)
    with file.open("wb") as opened:
        for start in range(0, count, PIECE):
            own = piece[: count - start]
            if checked:
                checksum.update(own)
            opened.write(own)
        opened.flush()
        os.fsync(opened.fileno())


def files_alone(source: Path, journal: int, output: int, folder: Path) -> dict[str, float]:
    """Seconds of each part."""
    kept, written = folder / "journal.bin", folder / "output.bin"
    parts = {
        "the source, read": lambda: read(source.glob("*.safetensors"), checked=True),
        "the journal, written": lambda: write(kept, journal, checked=True),
        "the journal, read": lambda: read([kept], checked=True),
        "the output, written": lambda: write(written, output, checked=False),
        "the output, read": lambda: read([written], checked=False),
    }
    found = {}
    for name, part in parts.items():
        start = time.perf_counter()
        part()
        found[name] = time.perf_counter() - start
    return found


def main(words: list[str] | None = None) -> None:
    """Parse options, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "autoround-bench")
    options = parser.parse_args(words)
    options.folder.mkdir(parents=True, exist_ok=True)
    print(machine.describe(), flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        print(make_model(folder / "model", hidden=options.hidden, blocks=options.blocks), flush=True)
        job = dataclasses.replace(make_job(folder), iters=None)
        runs, files = list[float](), list[dict[str, float]]()
        for _ in range(options.rounds):
            words = [*TOOLS[OURS].recipes["rtn"](job), "--no_clip_search"]
            runs.append(measure(words, folder / "log.txt", {}).seconds)
            journal, output = size_of(folder / "out.journal"), size_of(folder / "out")
            for made in ("out", "out.journal"):
                shutil.rmtree(folder / made)
            files.append(files_alone(folder / "model", journal, output, folder))
        print(f"journal {journal / 1e9:.2f} GB, output {output / 1e9:.2f} GB; medians of {options.rounds} rounds")
        for part in files[0]:
            print(f"{part + ':':22} {statistics.median(own[part] for own in files):5.1f} s")
        alone, whole = statistics.median(sum(own.values()) for own in files), statistics.median(runs)
        print(f"files alone {alone:.1f} s, the whole command {whole:.1f} s: {whole / alone:.2f} times")


if __name__ == "__main__":
    main()
