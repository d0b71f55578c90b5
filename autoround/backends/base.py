"""What the engine asks of a device, and how a name becomes one."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, TypeVar

import torch

from autoround.errors import UsageError
from autoround.launch import Launch
from autoround.layers import read_mapping

# Token-steps from which on compiling is taken to pay on an accelerator.
ACCELERATOR_TOKEN_STEPS = 10_000_000

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """Choices that touch numbers: recorded in the journal and reused when a run goes on.

    Attributes:
        device: torch device type.
        dtype: in which blocks compute, by name; parameters, losses and codes are float32 whatever it is.
        attention: transformers' attention implementation.
        compiler: of the tuning step, as ``torch.compile`` calls it; None leaves it uncompiled.
        threads: of the CPU.
        micro_batches: into how many parts the rows of a step are divided.
    """

    device: str
    dtype: str
    attention: str
    compiler: str | None
    threads: int
    micro_batches: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that ``dtype`` names."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]


class Backend(Protocol):
    """One kind of device.

    Attributes:
        name: torch device type.
        compiler: what ``torch.compile`` calls the compiler for it.
    """

    name: str
    compiler: str

    def count(self) -> int:
        """How many of its devices this machine has."""
        ...

    def compute_dtype(self) -> torch.dtype:
        """The fastest dtype for training matmuls that is accurate enough."""
        ...

    def attention(self, seqlen: int) -> str:
        """The fastest attention implementation in training at this length."""
        ...

    def lacks(self) -> str:
        """What would have to be installed before anything can be compiled, in words; empty where nothing is missing."""
        ...

    def compile_helps(self, token_steps: int) -> bool:
        """Whether compiling pays for a run of so many tokens x steps, all blocks together."""
        ...

    def prepare_compiler(self) -> None:
        """Do what the compiler does before the first compilation and what can be done beside other work."""
        ...

    def memory_bytes(self) -> int:
        """Memory this process holds on its devices, in bytes."""
        ...

    def device_bytes(self, device: torch.device) -> int | None:
        """Memory that a device has in all, in bytes; None where that is not known, or the host's."""
        ...

    def free_device_bytes(self, device: torch.device) -> int | None:
        """Memory of a device that nobody uses, in bytes; None where that is not known, or the host's."""
        ...

    def title(self, device: torch.device) -> str:
        """What the device is, in a few words."""
        ...

    def release_memory(self) -> None:
        """Hand memory that was freed back to the system."""
        ...


class Accelerator:
    """What the backends of all accelerators answer alike."""

    __slots__ = ()

    def attention(self, seqlen: int) -> str:
        """Fused at every length."""
        del seqlen  # no bearing here
        return "sdpa"

    def lacks(self) -> str:
        """Nothing: compilers come with torch."""
        return ""

    def compile_helps(self, token_steps: int) -> bool:
        """Only for runs that outlast the compilation."""
        return token_steps >= ACCELERATOR_TOKEN_STEPS

    def prepare_compiler(self) -> None:
        """There is nothing that takes long."""


# Accelerators come in the order in which ``auto`` and plain numbers look for them.
BACKENDS: Mapping[str, str] = {
    "cpu": "autoround.backends.cpu:CPU",
    "cuda": "autoround.backends.gpu:CUDA",
    "xpu": "autoround.backends.gpu:XPU",
    "hpu": "autoround.backends.hpu:HPU",
}
ACCELERATORS = tuple(kind for kind in BACKENDS if kind != "cpu")


def select(device_map: str) -> tuple[Backend, torch.device]:
    """The backend and the first device that ``--device_map`` names; see ``select_all``."""
    backend, devices = select_all(device_map)
    return backend, devices[0]


def select_all(device_map: str) -> tuple[Backend, tuple[torch.device, ...]]:
    """The backend and all devices that ``--device_map`` names.

    Args:
        device_map: auto (the first accelerator, else the CPU); or devices of one kind, separated by commas, each a
            kind (``cpu``, ``cuda``), a kind and a number (``xpu:1``), or the number of an accelerator (``1``); or a
            mapping from modules to such devices, ``{mlp: 1}``: the first one is then that of the rest, see ``named``.

    Raises:
        UsageError: unknown, named twice, of several kinds, or not on this machine.
    """
    accelerator = _accelerator()
    if device_map.strip().lower() == "auto":
        kind = accelerator or "cpu"
        return load(kind), (torch.device(kind),)
    if device_map.strip().startswith("{"):
        found = list(dict.fromkeys(_entries(device_map, accelerator).values()))
    else:
        found = [_parse(part, accelerator, device_map) for part in device_map.split(",")]
    if len({kind for kind, _ in found}) > 1:
        raise UsageError(f"device_map: found {device_map!r}; needed devices of one kind")
    if len(set(found)) < len(found):
        raise UsageError(f"device_map: found {device_map!r}; needed each device once")
    backend = load(found[0][0])
    if any((index or 0) >= backend.count() for _, index in found):
        raise UsageError(
            f"device_map: found {device_map!r}; needed a device of this machine, which has a CPU and "
            f"{_accelerators()}; use {'one of them, or auto' if accelerator else 'cpu'}"
        )
    return backend, tuple(_device(*each) for each in found)


def named(device_map: str) -> dict[str, torch.device]:
    """What ``--device_map`` says of single modules: pattern -> device; "" is the rest, on the kind's first device.

    Args:
        device_map: accepted by ``select_all``; nothing comes of one that names devices alone.
    """
    if not device_map.strip().startswith("{"):
        return {}
    return {pattern: _device(*each) for pattern, each in _entries(device_map, _accelerator()).items()}


def of_rank(backend: Backend, devices: tuple[torch.device, ...], launch: Launch | None) -> tuple[torch.device, ...]:
    """The devices of one process: all that were chosen; or where torchrun started it, one of those of its machine.

    Args:
        backend: of the devices.
        devices: from ``select_all``; one without a number stands for all of its kind.
        launch: the place of the process; None where it is alone.

    Raises:
        UsageError: the machine runs more processes than it has devices for.
    """
    if launch is None or backend.name == "cpu":
        return devices
    if devices[0].index is None:
        devices = tuple(torch.device(backend.name, index) for index in range(backend.count()))
    if launch.local_size > len(devices):
        raise UsageError(
            f"torchrun: found {launch.local_size} processes on a machine and {len(devices)} devices for them; needed a "
            "device for each; lower --nproc-per-node, or name more with --device_map"
        )
    return (devices[launch.local_rank],)


def _accelerator() -> str | None:
    """The first kind of which this machine has one."""
    return next((kind for kind in ACCELERATORS if load(kind).count()), None)


def _device(kind: str, index: int | None) -> torch.device:
    return torch.device(kind) if index is None else torch.device(kind, index)


def _entries(device_map: str, accelerator: str | None) -> dict[str, tuple[str, int | None]]:
    """Kind and number of the device of each pattern, the rest first."""
    quoted = re.sub(rf"(?<!['\"])\b({'|'.join(BACKENDS)}):(\d+)", r"'\1:\2'", device_map.strip(), flags=re.IGNORECASE)
    given = read_mapping(quoted, where="device_map")
    if not isinstance(given, Mapping) or not given:
        raise UsageError(f"device_map: found {device_map!r}; needed a device for a module, such as {{mlp: 1}}")
    found = {}
    for pattern, device in given.items():
        kind, index = _parse(str(device).replace(" ", ""), accelerator, device_map)
        found[str(pattern)] = (kind, None if kind == "cpu" else index or 0)
    kind = next(iter(found.values()))[0]
    return {"": (kind, None if kind == "cpu" else 0), **found}


def _parse(part: str, accelerator: str | None, device_map: str) -> tuple[str, int | None]:
    """Kind and number of one device; a number alone is one of the accelerator's."""
    kind, _, index = part.strip().lower().partition(":")
    if kind.isdigit() and not index:
        kind, index = accelerator or ACCELERATORS[0], kind
    if kind not in BACKENDS or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise UsageError(
            f"device_map: found {device_map!r}; needed auto, {', '.join(BACKENDS)}, or numbers of accelerators with "
            "commas between them"
        )
    return kind, int(index) if index else None


def _accelerators() -> str:
    """The accelerators of this machine in words."""
    counts = {kind.upper(): load(kind).count() for kind in ACCELERATORS}
    words = [f"one {kind} device, 0" if count == 1 else f"{kind} devices 0 to {count - 1}"
             for kind, count in counts.items() if count]  # fmt: skip
    return " and ".join(words) or "no accelerator that torch sees"


def load(kind: str) -> Backend:
    """The backend of a kind of device, whether or not this machine has one."""
    module, _, name = BACKENDS[kind].partition(":")
    backend: Backend = getattr(import_module(module), name)
    return backend


def jit(function: F, *, compiler: str | None) -> F:
    """Compile a function of fixed shapes whole, apart from other compilations of the same code; or return it.

    Args:
        function: traceable as a whole.
        compiler: what ``torch.compile`` calls it; None returns the function.
    """
    if compiler is None:
        return function
    return torch.compile(  # type: ignore[return-value]
        function, fullgraph=True, dynamic=False, isolate_recompiles=True, backend=compiler
    )
