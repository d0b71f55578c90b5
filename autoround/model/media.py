"""What a model that sees images is given beside tokens: pixels, their grids, and which tokens stand for them.

Legend: B samples.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional


class Media:
    """Arguments of forwards beside token ids and their mask, for any choice of rows.

    Args:
        rows: for every row its arguments by name; along the first axis lies all that this row has of them, such as its
            images or patches. The other axes may differ in size: shorter ones are filled up with zeros.

    >>> rows = [{"pixel_values": torch.ones(1, 2)}, {}, {"pixel_values": torch.ones(2, 3)}]
    >>> Media(rows).take(torch.tensor([1, 2, 0]))["pixel_values"].shape
    torch.Size([3, 3])
    >>> Media(rows).take(torch.tensor([1]))
    {}
    """

    def __init__(self, rows: Sequence[Mapping[str, Tensor]] = ()) -> None:
        self._rows = rows
        self._sizes: dict[str, list[int]] = {}
        for name, tensor in (item for row in rows for item in row.items()):
            known = self._sizes.get(name, [0] * (tensor.ndim - 1))
            self._sizes[name] = [max(pair) for pair in zip(known, tensor.shape[1:], strict=True)]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def richest(self) -> int:
        """The row that has most; the first one where none has anything."""
        counts = [sum(tensor.numel() for tensor in row.values()) for row in self._rows] or [0]
        return counts.index(max(counts))

    def take(self, rows_B: Tensor) -> dict[str, Tensor]:
        """The arguments of a forward with these rows, those that none of them has left out."""
        own = [self._rows[row] for row in rows_B.tolist()] if self._rows else []
        return {
            name: torch.cat([_filled(row[name], sizes) for row in own if name in row])
            for name, sizes in self._sizes.items()
            if any(name in row for row in own)
        }


NO_MEDIA = Media()


def _filled(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """With zeros after what it has in every axis but the first."""
    missing = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
    return functional.pad(tensor, [end for each in reversed(missing) for end in (0, each)]) if any(missing) else tensor
