"""Files that are whole or not there, and checksums of what they hold."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from autoround.errors import JournalError

# Where a file keeps the checksum of the rest of it.
SEAL = "sha256"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name that becomes ``path``, synced, when the block ends well, and vanishes when it does not."""
    temporary = partial_name(path)
    with reported(path):
        try:
            yield temporary
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Failures to write, with what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise JournalError(
            f"{path}: {error}; needed a writable folder with space; run again when there is: finished blocks are kept"
        ) from error


def partial_name(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def seal_of(notes: Mapping[str, Any], tensors: Mapping[str, Tensor] = MappingProxyType({})) -> str:
    """A checksum of what a file holds."""
    text = json.dumps(dict(notes), sort_keys=True) + digest((name, tensors[name]) for name in sorted(tensors))
    return hashlib.sha256(text.encode()).hexdigest()


def digest(tensors: Iterator[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, one at a time."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        total.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return total.hexdigest()
