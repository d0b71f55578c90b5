"""What this machine has free for a run."""

import shutil
from pathlib import Path

import torch

from autoround.backends.base import load
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
    free = load(device.type).free_device_bytes(device)
    parent = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return Room(host=max(bounds[limit], 0), host_limit=limit, device=free, disk=shutil.disk_usage(parent).free)
