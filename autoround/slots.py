"""Rows that flow from block to block, in memory-mapped files of the journal.

Two slots alternate, so that the last finished block's rows are always whole::

    activations/0.json          of an even block: which one, the shapes and dtypes of its rows, and a checksum
    activations/0.float_NTD     rows, byte for byte as in memory; they count only beside the .json, which comes last
    activations/1.json          of an odd one, …
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoround.errors import JournalError
from autoround.sealed import SEAL, replacing, reported, seal_of

# Blocks whose rows are kept: the last finished one's, and those of the one that is tuned or that was before it.
SLOTS = 2


class Slots:
    """The folder of activations of a journal; it is made when something is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[int, str], Tensor] = {}

    def make(self, index: int, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that lies in a file, for rows that flow out of a block; what is written to it is kept by ``write``.

        Args:
            index: of the block; the rows of the block before the last one, which nothing needs any more, make room.
            name: of the tensor.
            shape: of the tensor.
            dtype: of the tensor.

        Raises:
            JournalError: the disk is full or not writable.
        """
        file, items = self._file(index, name), math.prod(shape)
        with reported(file):
            self._folder.mkdir(exist_ok=True)
            if not any(made == index for made, _ in self._made):
                self._made.clear()  # who needs others still has them
                for old in self._folder.glob(f"{index % SLOTS}.*"):
                    old.unlink()
            if items:
                try:
                    _allocate(file, items * dtype.itemsize)
                except OSError:
                    file.unlink(missing_ok=True)
                    raise
        made = _mapped(file, shape, dtype)
        self._made[index, name] = made
        return made

    def write(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the inputs of the block after ``index``; those that ``make`` gave are in their files already.

        Raises:
            JournalError: the disk is full or not writable.
        """
        heads: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if self._made.get((index, name)) is not tensor:
                self.make(index, name, tensor.shape, tensor.dtype).copy_(tensor)
            heads[name] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        with reported(self._folder):
            for name, tensor in tensors.items():
                if tensor.numel():
                    with self._file(index, name).open("rb") as handle:
                        os.fsync(handle.fileno())
        notes = {"block": index, "tensors": heads}
        with replacing(self._notes(index)) as temporary:
            temporary.write_text(json.dumps({**notes, SEAL: seal_of(notes, tensors)}))
        self._made.clear()

    def read(self, index: int) -> dict[str, Tensor]:
        """The inputs of the block after ``index``, mapped.

        Raises:
            JournalError: they are missing, of another block, or damaged.
        """
        file, needed = self._notes(index), "needed a file of this journal; start anew with --restart"
        try:
            notes = json.loads(file.read_text())
            seal, block, heads = notes.pop(SEAL), notes["block"], dict(notes["tensors"])
            tensors = {}
            for name, head in heads.items():
                file = self._file(index, name)
                tensors[name] = _mapped(file, head["shape"], getattr(torch, head["dtype"]))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise JournalError(f"{file}: {error}; {needed}") from error
        if seal != seal_of(notes, tensors):
            raise JournalError(f"{self._notes(index)}: found rows that do not match their checksum; {needed}")
        if block != index:
            raise JournalError(
                f"{self._notes(index)}: found activations of block {block}; needed {index}; start anew with --restart"
            )
        return tensors

    def drop(self) -> None:
        """Forget them: after the last block nothing needs them."""
        self._made.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _notes(self, index: int) -> Path:
        return self._folder / f"{index % SLOTS}.json"

    def _file(self, index: int, name: str) -> Path:
        return self._folder / f"{index % SLOTS}.{name}"


def _allocate(file: Path, size: int) -> None:
    """A file of a size that the disk has set aside: a mapped one that it has no room for would end the process."""
    with file.open("wb") as handle:
        if sys.platform == "linux":
            os.posix_fallocate(handle.fileno(), 0, size)
        else:
            handle.truncate(size)


def _mapped(file: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    items = math.prod(shape)
    if not items:
        return torch.empty(shape, dtype=dtype)
    if (size := file.stat().st_size) != items * dtype.itemsize:  # torch would make it longer
        raise ValueError(f"found {size} bytes; needed {items * dtype.itemsize}")
    return torch.from_file(str(file), shared=True, size=items, dtype=dtype).view(*shape)
