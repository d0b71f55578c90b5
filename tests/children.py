"""Scripts of the tests in processes of their own, which tell lines and are answered."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(script: Path, folder: Path, *, threads: int = 1) -> "subprocess.Popen[str]":
    """Start a script that is given a folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment, cwd=ROOT,
    )  # fmt: skip


def events(child: "subprocess.Popen[str]") -> Iterator[str]:
    """The lines that it tells; each is answered when the next one is asked for."""
    assert child.stdin is not None
    assert child.stdout is not None
    for line in child.stdout:
        yield line.removesuffix("\n")
        child.stdin.write("\n")
        child.stdin.flush()
