"""Tensors of safetensors files one at a time, with no more of a file mapped than the tensor at hand.

The library maps whole files, as often as they are opened, and as memory that may be written to: a process with a limit
on its data could open no file that is larger.
"""

import json
import mmap
import struct
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

# Dtypes that files may have and the library's ``load`` does not know.
_OTHERS = {"F8_E8M0": torch.float8_e8m0fnu}
# Headers that are kept: of a block's file and its neighbours.
_FILES = 8


def read_heads(file: Path) -> dict[str, Tensor]:
    """Meta tensors of a file's contents, in the library's order.

    Raises:
        SafetensorError, OSError: the header is damaged, or does not fit the file's size.
    """
    with safe_open(file, framework="np") as handle:  # which maps nothing to be written to
        slices: dict[str, Any] = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118  not a dict
        dtypes = dtypes_of({own.get_dtype() for own in slices.values()})
        return {
            key: torch.empty(own.get_shape(), dtype=dtypes[own.get_dtype()], device="meta")
            for key, own in slices.items()
        }


def dtypes_of(names: Iterable[str]) -> dict[str, torch.dtype]:
    """Dtypes by their names in safetensors, told by the library itself: it reads empty tensors of them."""
    asked = sorted(set(names) - set(_OTHERS))
    header = json.dumps({name: {"dtype": name, "shape": [0], "data_offsets": [0, 0]} for name in asked}).encode()
    return _OTHERS | {name: tensor.dtype for name, tensor in load(struct.pack("<Q", len(header)) + header).items()}


def read_tensor(file: Path, key: str) -> Tensor:
    """One tensor, whose part of the file is mapped while it is in use; what is written to it stays in memory.

    Raises:
        OSError, ValueError: the file is gone or damaged.
        KeyError: it has no such tensor.
    """
    stat = file.stat()
    head, start = _contents(file, stat.st_size, stat.st_mtime_ns)[key]
    if not head.numel():
        return torch.empty(head.shape, dtype=head.dtype)
    before = start % mmap.ALLOCATIONGRANULARITY
    with file.open("rb") as stream:
        part = mmap.mmap(stream.fileno(), before + head.nbytes, access=mmap.ACCESS_COPY, offset=start - before)
    return torch.frombuffer(part, dtype=head.dtype, count=head.numel(), offset=before).view(head.shape)


@lru_cache(maxsize=_FILES)
def _contents(file: Path, size: int, changed_ns: int) -> dict[str, tuple[Tensor, int]]:
    """Name -> the tensor without data, and where its bytes begin; of a file as it was when last looked at."""
    del size, changed_ns  # by which another file of this name is told
    heads = read_heads(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    return {key: (head, 8 + length + header[key]["data_offsets"][0]) for key, head in heads.items()}
