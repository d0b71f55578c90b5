"""Intel Gaudi through its bridge to torch, habana_frameworks.torch, which adds the device type ``hpu``.

Tested against a recorded fake of the calls below; not run on hardware.
"""

import gc
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from autoround.backends.base import Accelerator


class HpuBackend(Accelerator):
    """torch on its accelerators."""

    name = "hpu"
    compiler = "hpu_backend"

    def count(self) -> int:
        """Accelerators that the bridge sees; none without it."""
        if find_spec("habana_frameworks") is None:
            return 0
        bridge = _bridge()
        return int(bridge.device_count()) if bridge.is_available() else 0

    def compute_dtype(self) -> torch.dtype:
        """bfloat16, which its matrix units are built for."""
        return torch.bfloat16

    def memory_bytes(self) -> int:
        """Memory that the bridge holds on all of them."""
        return sum(int(_bridge().memory_allocated(index)) for index in range(self.count()))

    def device_bytes(self, device: torch.device) -> int | None:
        """Not asked for: no call of the bridge is known here that tells it."""
        del device  # all alike
        return None

    def free_device_bytes(self, device: torch.device) -> int | None:
        """Not asked for either."""
        del device
        return None

    def title(self, device: torch.device) -> str:
        """How many there are, and the name of one."""
        del device
        return f"{self.count()} x {_bridge().get_device_name()}"

    def release_memory(self) -> None:
        """The bridge keeps no cache that could be emptied; Python's garbage may hold tensors."""
        gc.collect()


def _bridge() -> Any:
    return import_module("habana_frameworks.torch.hpu")


HPU = HpuBackend()
