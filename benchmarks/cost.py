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
    """Of one command: wall time in seconds, and peak memory in GB of the process: resident, and that without a file."""

    seconds: float
    gigabytes: float
    anonymous_gigabytes: float = 0.0


def measure(
    command: list[str],
    log: Path,
    environment: Mapping[str, str],
    *,
    cache: Path | None = None,
    data_limit: int | None = None,
    timeout: float | None = None,
) -> Cost:
    """Run a command in the folder of its log.

    Args:
        command: words.
        log: file for what it prints.
        environment: variables beside our own.
        cache: folder of compiled code; a new one, deleted afterwards, when None: the compiler starts cold.
        data_limit: RLIMIT_DATA in bytes: heap, stacks of threads, and files that are mapped to be written to.
        timeout: seconds after which it is ended, with its children.

    Raises:
        Failed: it failed or took too long.
    """
    with tempfile.TemporaryDirectory() as cold, log.open("w") as output:
        variables = {**os.environ, **QUIET, CACHE: str(cache or cold), **environment}
        start = time.monotonic()
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables, cwd=log.parent)
        own = anonymous = 0
        if data_limit is not None:
            process.rlimit(psutil.RLIMIT_DATA, (data_limit, data_limit))
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                rss = process.memory_info().rss
                own, anonymous = max(own, rss), max(anonymous, _anonymous(process.pid))
            if timeout is not None and time.monotonic() - start > timeout:
                _end(process)
                raise Failed(f"{command[0]}: ended after {timeout:.0f} s; see {log}")
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - start
    if process.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-3:]
        raise Failed(f"{command[0]}: status {process.returncode}; see {log}: {' | '.join(last)}")
    return Cost(seconds, own / 1e9, anonymous / 1e9)


def _end(process: psutil.Process) -> None:
    """Kill a process and its children, and wait for it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
    process.wait()


def _anonymous(pid: int) -> int:
    """Resident memory of a process for which no file stands; 0 where /proc does not tell or the process is gone."""
    try:
        told = Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")[2].split()
    except OSError:
        return 0
    return int(told[0]) * 1024 if told else 0
