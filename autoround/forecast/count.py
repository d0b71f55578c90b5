"""Counting the bytes of tensors while code runs on tensors without data."""

import gc
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from autoround.backends.host import MAPPED_BYTES

_aten = torch.ops.aten
# After so many new tensors their cycles are collected, about as often as Python would.
COLLECTED_TENSORS = 32


class ByteCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that live, by kind of device; to be entered within a ``FakeTensorMode``.

    Questions that need data are answered so that work goes on: truths are true, numbers 0, and of a choice by a mask
    everything is taken.

    Args:
        kept: resident bytes for each byte of a tensor in the heap of the CPU's allocator.

    Attributes:
        live, peak: bytes by kind of device.
    """

    def __init__(self, kept: float = 1.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept
        self.live: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = defaultdict(int)
        self._known = WeakIdKeyDictionary()
        self._noted, self._collects = 0, False

    def __enter__(self) -> "ByteCount":
        """Cycles of tensors are collected at moments that do not depend on what the process did before."""
        gc.collect()
        self._collects = gc.isenabled()
        gc.disable()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self._collects:
            gc.enable()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _aten._local_scalar_dense.default:
            return _answer(args[0].dtype)
        if func is _aten.index.Tensor and (chosen := _masked(*args)) is not None:
            found = chosen
        else:
            found = func(*args, **(kwargs or {}))
        for each in tree_iter(found):
            if isinstance(each, Tensor):
                self._note(each)
        return found

    def _note(self, tensor: Tensor) -> None:
        storage, device = tensor.untyped_storage(), tensor.device.type
        if storage in self._known or device == "meta":
            return
        self._known[storage] = True
        size = self.resident(storage.nbytes(), device)
        self._noted += 1
        if self._noted % COLLECTED_TENSORS == 0:
            gc.collect(1)
        self.live[device] += size
        self.peak[device] = max(self.peak[device], self.live[device])
        weakref.finalize(storage, self._free, device, size)

    def resident(self, size: int, device: str) -> int:
        """Bytes that a tensor takes on a kind of device."""
        return round(self._kept * size) if device == "cpu" and size < MAPPED_BYTES else size

    def _free(self, device: str, size: int) -> None:
        self.live[device] -= size


def without_data() -> FakeTensorMode:
    """The mode in which tensors have shapes alone."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def _answer(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 0.0 if dtype.is_floating_point else 0


def _masked(tensor: Tensor, indices: Sequence[Tensor | None]) -> Tensor | None:
    """As much as a boolean mask may choose; None where there is none."""
    mask = indices[0] if len(indices) == 1 else None
    if mask is None or mask.dtype != torch.bool:
        return None
    return tensor.new_empty(mask.numel(), *tensor.shape[mask.ndim :])
