"""What the engine asks of a device, and how a name becomes one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, TypeVar

import torch

from autoround.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """Choices that touch numbers: recorded in the journal and reused when a run goes on.

    Attributes:
        device: torch device type.
        dtype: in which blocks compute, by name; parameters, losses and codes are float32 whatever it is.
        attention: transformers' attention implementation.
        compiled: whether the tuning step is compiled.
        threads: of the CPU.
    """

    device: str
    dtype: str
    attention: str
    compiled: bool
    threads: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that ``dtype`` names."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]


class Backend(Protocol):
    """One kind of device."""

    name: str

    def available(self) -> bool:
        """Whether this machine has it."""
        ...

    def compute_dtype(self) -> torch.dtype:
        """The fastest dtype for training matmuls that is accurate enough."""
        ...

    def attention(self, seqlen: int) -> str:
        """The fastest attention implementation in training at this length."""
        ...

    def compile_helps(self, token_steps: int) -> bool:
        """Whether compiling pays for a run of so many tokens x steps, all blocks together."""
        ...

    def memory_bytes(self) -> int:
        """Memory this process holds on the device, in bytes."""
        ...

    def release_memory(self) -> None:
        """Hand memory that was freed back to the system."""
        ...


BACKENDS: Mapping[str, str] = {
    "cpu": "autoround.backends.cpu:CPU",
    "cuda": "autoround.backends.cuda:CUDA",
}


def select(device_map: str) -> tuple[Backend, torch.device]:
    """The backend and device that ``--device_map`` names.

    Args:
        device_map: auto (the first accelerator, else the CPU), cpu, cuda, or a CUDA device as ``1`` or ``cuda:1``.

    Raises:
        UsageError: unknown, not supported yet, or not on this machine.
    """
    name = device_map.strip().lower()
    if name == "auto":
        name = "cuda" if _load("cuda").available() else "cpu"
    if name.isdigit():
        name = f"cuda:{name}"
    several = [each.strip().removeprefix("cuda:") for each in name.split(",")]
    if "{" in name or (len(several) > 1 and all(map(_here, several))):
        raise UsageError(f"device_map: found {device_map!r}; needed a single device: runs over several come later")
    if len(several) > 1 and all(each.isdigit() for each in several):
        raise UsageError(_lacking(device_map))
    kind, _, index = name.partition(":")
    if kind not in BACKENDS or (index and not index.isdigit()):
        raise UsageError(
            f"device_map: found {device_map!r}; needed auto, {', '.join(BACKENDS)} or a CUDA device number"
        )
    backend = _load(kind)
    if not backend.available() or (kind == "cuda" and index and not _here(index)):
        raise UsageError(_lacking(device_map))
    return backend, torch.device(kind, int(index)) if index else torch.device(kind)


def _here(index: str) -> bool:
    """Whether this machine has the CUDA device of that number."""
    return index.isdigit() and int(index) < torch.cuda.device_count()


def _lacking(device_map: str) -> str:
    """What is said of devices that are not there."""
    count = torch.cuda.device_count()
    has = {0: "no CUDA device that torch sees", 1: "one CUDA device, 0"}.get(count, f"CUDA devices 0 to {count - 1}")
    use = "cpu" if count == 0 else "one of them, or auto"
    return f"device_map: found {device_map!r}; needed a device of this machine, which has a CPU and {has}; use {use}"


def jit(function: F, *, enabled: bool) -> F:
    """Compile a function of fixed shapes whole, apart from other compilations of the same code; or return it."""
    if not enabled:
        return function
    return torch.compile(function, fullgraph=True, dynamic=False, isolate_recompiles=True)  # type: ignore[return-value]


def _load(kind: str) -> Backend:
    module, _, name = BACKENDS[kind].partition(":")
    backend: Backend = getattr(import_module(module), name)
    return backend
