"""Memory of the host: what this process may still take, and how its allocator keeps what was freed."""

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

_CGROUP = Path("/sys/fs/cgroup")
# Tensors from this size on are mapped by themselves. Smaller ones lie among others, as those of a step do that come and
# go all the time: mapped anew each time, they would make steps slower.
MAPPED_BYTES = 2**23
# What may be free at the end of the heap: about as much as a small model's step takes and frees, which would have to be
# handed out by the system page by page in every step.
KEPT_BYTES = 2**27
# Names of glibc's settings.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def free_bytes() -> dict[str, int]:
    """Bytes by what sets the bound: this machine, its control group, and the limit of this process if it has one."""
    bounds = {"this machine": int(psutil.virtual_memory().available)}
    if (grouped := group_free()) is not None:
        bounds["its control group"] = grouped
    if (own := _own_free()) is not None:
        bounds["the limit of this process"] = own
    return bounds


def settle_heap() -> None:
    """Fix from which size on memory is mapped by itself, which glibc raises to 32 MiB as it meets larger pieces.

    Tensors of tens of megabytes then lie in the heap, which breaks up and grows from block to block. For the process
    of a command: call it before work begins. Without glibc nothing happens.
    """
    if (set_option := _glibc("mallopt")) is not None:
        set_option(_MMAP_THRESHOLD, MAPPED_BYTES)
        set_option(_TRIM_THRESHOLD, KEPT_BYTES)


def trim_heap(kept: int = 0) -> None:
    """Give back what was freed between two live pieces, which glibc keeps until it is told; takes some milliseconds.

    Args:
        kept: bytes that may stay free at the end.
    """
    if (trim := _glibc("malloc_trim")) is not None:
        trim(ctypes.c_size_t(kept))


def release_heap() -> None:
    """The same, after Python's garbage, which takes a fifth of a second."""
    gc.collect()
    trim_heap()


def group_free(root: Path = _CGROUP, groups: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that the control groups of this process leave it; None where they set no bound.

    Every group above counts as well; mounted into a container, the root is the process's own group.
    """
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return None
    free = []
    for _, kinds, path in (line for line in lines if len(line) == 3):
        if kinds == "":
            base, limit, used = root, "memory.max", "memory.current"
        elif "memory" in kinds.split(","):
            base, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = base / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(base) and (bound := _number(folder / limit)) is not None:
                free.append(bound - (_number(folder / used) or 0) + _reclaimable(folder / "memory.stat"))
    return min(free, default=None)


def _reclaimable(file: Path) -> int:
    """Bytes of cached files that a group counts as used and gives up when memory is short."""
    try:
        counts = dict(line.split(" ", 1) for line in file.read_text().splitlines())
    except OSError:
        return 0
    return int(counts.get("total_inactive_file", counts.get("inactive_file", "0")))


def _own_free() -> int | None:
    """Bytes that RLIMIT_DATA and RLIMIT_AS leave this process; None where they set no bound."""
    if sys.platform != "linux":
        return None
    process = psutil.Process()
    memory = process.memory_info()
    free = [soft - used
            for kind, used in ((psutil.RLIMIT_DATA, memory.data), (psutil.RLIMIT_AS, memory.vms))
            for soft in process.rlimit(kind)[:1] if soft >= 0]  # fmt: skip
    return min(free, default=None)


def _number(file: Path) -> int | None:
    """The number that a file holds; None for "max" and where there is no such file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _glibc(name: str) -> Any:
    """One of its functions; None where there is none."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
