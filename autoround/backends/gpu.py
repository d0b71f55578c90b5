"""NVIDIA GPUs through torch.cuda (ROCm builds of torch answer to the same name) and Intel GPUs through torch.xpu.

The XPU backend is tested against a recorded fake of the calls below; it was not run on hardware.
"""

import gc
from dataclasses import dataclass
from typing import Any

import torch

from autoround.backends.base import Accelerator


@dataclass(frozen=True, slots=True)
class GpuBackend(Accelerator):
    """torch on the GPUs of one maker.

    Attributes:
        name: of the device type, and of the module of torch that answers for it.
        compiler: what ``torch.compile`` calls the compiler for it.
    """

    name: str
    compiler: str = "inductor"

    def count(self) -> int:
        """GPUs that torch sees."""
        return int(self._torch.device_count()) if self._torch.is_available() else 0

    def compute_dtype(self) -> torch.dtype:
        """bfloat16 where the GPU has it, else float16."""
        return torch.bfloat16 if self._torch.is_bf16_supported() else torch.float16

    def memory_bytes(self) -> int:
        """Memory that torch holds on all of them."""
        return sum(int(self._torch.memory_allocated(index)) for index in range(self.count()))

    def device_bytes(self, device: torch.device) -> int | None:
        """All of the memory of one of them, whoever uses it, so that a run that goes on finds the same."""
        return int(self._torch.get_device_properties(device).total_memory)

    def free_device_bytes(self, device: torch.device) -> int | None:
        """Free memory as its driver tells it; not all drivers of Intel GPUs do."""
        try:
            free, _ = self._torch.mem_get_info(device)
        except RuntimeError:
            return None
        return int(free)

    def title(self, device: torch.device) -> str:
        """How many there are, and the name of one."""
        return f"{self.count()} x {self._torch.get_device_name(device)}"

    def release_memory(self) -> None:
        """Empty torch's cache of freed memory."""
        gc.collect()
        self._torch.empty_cache()

    @property
    def _torch(self) -> Any:
        return getattr(torch, self.name)


CUDA = GpuBackend("cuda")
XPU = GpuBackend("xpu")
