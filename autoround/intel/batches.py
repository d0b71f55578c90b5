"""Batches of a DataLoader or another iterable -> rows. Dims: B rows of a batch, T tokens in a row."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate


def rows(dataset: Any, count: int) -> Any:
    """Texts or rows of token ids out of batches; a dataset that is no iterable of batches is returned as it is.

    Args:
        dataset: a DataLoader or another iterable. Its batches are ids (B, T) or sequences that begin with them,
            mappings with "input_ids" and maybe "attention_mask", lists of texts, or mappings with "text".
        count: rows to take at most.

    >>> rows([{"input_ids": [[5, 6], [7, 8]]}, {"input_ids": [[9, 1]]}], 3)
    [[5, 6], [7, 8], [9, 1]]
    """
    if not isinstance(dataset, Iterable) or isinstance(dataset, str | Tensor | Mapping):
        return dataset
    encoded = (
        isinstance(dataset, Sequence) and dataset and isinstance(dataset[0], Mapping) and "input_ids" in dataset[0]
    )
    if isinstance(dataset, Sequence) and not encoded:
        return dataset
    # torch's own way to make a batch turns lists of numbers into one tensor for each place in a row
    turned = getattr(dataset, "collate_fn", None) is default_collate
    found: list[Any] = []
    for batch in dataset:
        found += _rows_of(batch, turned=turned)
        if len(found) >= count:
            break
    return found[:count]


def _rows_of(batch: Any, *, turned: bool) -> list[Any]:
    mask_BT = None
    if isinstance(batch, Mapping):
        mask_BT = _upright(batch.get("attention_mask"), turned=turned)
        batch = _upright(batch.get("input_ids", batch.get("text", batch)), turned=turned)
    elif isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        batch = batch[0]
    if not isinstance(batch, Tensor):
        several = isinstance(batch, list | tuple) and not (batch and isinstance(batch[0], int))
        ids = list(batch) if several else [batch]
        if mask_BT is None:
            return ids
        masks = mask_BT if several else [mask_BT]
        return [[token for token, valid in zip(*row, strict=True) if valid] for row in zip(ids, masks, strict=True)]
    ids_BT = batch.reshape(-1, batch.shape[-1])
    if mask_BT is None:
        return list(ids_BT)
    return [row_T[valid_T.bool()] for row_T, valid_T in zip(ids_BT, mask_BT.reshape(ids_BT.shape), strict=True)]


def _upright(value: Any, *, turned: bool) -> Any:
    """Rows (B, T) of what may be a list of T tensors (B,)."""
    if turned and isinstance(value, list) and value and all(isinstance(each, Tensor) for each in value):
        return torch.stack(value, dim=-1)
    return value
