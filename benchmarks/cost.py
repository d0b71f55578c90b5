"""What a command costs: wall time and memory of whole processes, with a compile cache of their own."""

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

POLL_SECONDS = 0.05
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CACHE = "TORCHINDUCTOR_CACHE_DIR"


class Failed(Exception):
    """A command ended with another status than 0; the message ends with the last lines that it printed."""


class Cost(NamedTuple):
    """Of one command: wall time in seconds, and peak resident memory in GB of the process and with its children.

    The children are C++ compilers; what they share with the process counts once.
    """

    seconds: float
    gigabytes: float
    tree_gigabytes: float


def measure(command: list[str], log: Path, environment: Mapping[str, str], *, cache: Path | None = None) -> Cost:
    """Run a command in the folder of its log.

    Args:
        command: words.
        log: file for what it prints.
        environment: variables beside our own.
        cache: folder of compiled code; a new one, deleted afterwards, when None: the compiler starts cold.

    Raises:
        Failed: it failed.
    """
    with tempfile.TemporaryDirectory() as cold, log.open("w") as output:
        variables = {**os.environ, **QUIET, CACHE: str(cache or cold), **environment}
        start = time.monotonic()
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables, cwd=log.parent)
        own = tree = 0
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                rss = process.memory_info().rss
                own = max(own, rss)
                tree = max(tree, rss + sum(_unshared(child) for child in process.children(recursive=True)))
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - start
    if process.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-3:]
        raise Failed(f"{command[0]}: status {process.returncode}; see {log}: {' | '.join(last)}")
    return Cost(seconds, own / 1e9, tree / 1e9)


def _unshared(process: psutil.Process) -> int:
    """Memory of a process alone: between fork and exec it shares all of its parent's."""
    try:
        return int(process.memory_full_info().uss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
