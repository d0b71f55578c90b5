"""What this machine has free for a run."""

import shutil
from pathlib import Path

import torch

from autoround.backends.host import free_bytes
from autoround.forecast.types import Room


def room(folder: Path, device: torch.device) -> Room:
    """Look at memory, the limits on it, the device and the disk.

    Args:
        folder: where outputs go; it need not exist.
        device: where blocks run.
    """
    bounds = free_bytes()
    limit = min(bounds, key=lambda name: bounds[name])
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    parent = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return Room(host=max(bounds[limit], 0), host_limit=limit, device=free, disk=shutil.disk_usage(parent).free)
