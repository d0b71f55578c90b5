"""Memory of the host that this process may still take."""

import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes() -> dict[str, int]:
    """Bytes by what sets the bound: this machine, its control group, and the limit of this process if it has one."""
    bounds = {"this machine": int(psutil.virtual_memory().available)}
    if (grouped := group_free()) is not None:
        bounds["its control group"] = grouped
    if (own := _own_free()) is not None:
        bounds["the limit of this process"] = own
    return bounds


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
