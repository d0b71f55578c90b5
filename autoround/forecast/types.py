"""What is foretold of a run, as data. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass

from autoround.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNeed:
    """What tuning one kind of block takes.

    Attributes:
        paths: blocks of this kind, in call order.
        host, device: bytes of all tensors at the worst moment, the rows that flow from block to block included; the
            host's are all of them where the device is the CPU, and with them what its allocator keeps between them.
        codes: bytes of its codes in the journal.
    """

    paths: tuple[str, ...]
    host: int
    device: int
    codes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes that a run holds.

    Attributes:
        process: interpreter, libraries and modules, as measured in this process.
        activations: rows that flow from block to block, all copies that live at once.
        slots: bytes of those that the journal keeps.
        blocks: by kind of block.
        others: at the worst moment outside the blocks: embeddings, the output head, the longest tensor of a file.
        outside_codes: bytes of codes of layers outside the blocks in the journal.
        host, device: peaks of the whole run, what allocators keep included; device is 0 where that is the CPU.
    """

    process: int
    activations: int
    slots: int
    blocks: tuple[BlockNeed, ...]
    others: int
    outside_codes: int
    host: int
    device: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """How long a run will take.

    Attributes:
        step: one tuning step of one block.
        block: one block, mean over all.
        compiling: once for the run, with empty caches.
        around: reading, capturing, writing and reading back.
        total: of the run.
    """

    step: float
    block: float
    compiling: float
    around: float
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What this machine has free, in bytes.

    Attributes:
        host: memory that a process may still take.
        host_limit: what sets that bound: "this machine", "its control group" or "the limit of this process".
        device: memory of the device; None where that is the CPU, or where it is not known.
        disk: on the disk of the output folder.
    """

    host: int
    host_limit: str
    device: int | None
    disk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """Something of which there is too little, with what to type against it.

    Attributes:
        what: "memory", "device memory" or "disk".
        needed, free: bytes.
        flags: with which the run fits; empty where none were found.
    """

    what: str
    needed: int
    free: int
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What one run will need.

    Attributes:
        plan: the fate of every weight.
        formats: what it writes.
        numerics: device, dtype, attention, and whether steps are compiled, in words.
        files: format -> name of a weight file -> its bytes, exactly; configuration and tokenizer are not counted.
        memory: bytes.
        disk: bytes at the worst moment: the journal, with its activations or beside all files.
        seconds: None where no probe was wanted.
        room: what there is.
        shortages: what there is too little of.
    """

    plan: Plan
    formats: tuple[str, ...]
    numerics: str
    files: Mapping[str, Mapping[str, int]]
    memory: Memory
    disk: int
    seconds: Seconds | None
    room: Room
    shortages: tuple[Shortage, ...]
