"""What ranks other than the first have in place of a journal: they write nothing but rows that must lie on the disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoround.func.types import Codes
from autoround.journal import ACTIVATIONS, Journal
from autoround.slots import Slots


class Follower(Journal):
    """Takes what a journal takes and keeps nothing of it.

    Args:
        folder: of the first rank's journal.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder, {})
        self.activations = _Scratch(folder / ACTIVATIONS / f"rank-{rank}")

    def finished(self) -> int:
        """The first rank knows."""
        return 0

    def record(self, **parts: Any) -> None:
        """The first rank does."""

    def write_block(self, index: int, codes: Mapping[str, Codes], stats: Mapping[str, float]) -> None:
        """The first rank does."""

    def read_stats(self, index: int) -> dict[str, float]:
        """The first rank tells them."""
        return {}


class _Scratch(Slots):
    """Files for rows of this process, which it never reads again."""

    def make(self, index: int, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self._folder.mkdir(parents=True, exist_ok=True)
        return super().make(index, name, shape, dtype)

    def write(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        self._made.clear()
