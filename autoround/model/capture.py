"""The calls of all blocks, recorded in one forward in which recorders stand in for the blocks.

Recorders hand the hidden states on, so a forward costs no more than the embedding, the masks and the rotary tables.
Which tensors belong to single samples is learned from a forward of one row and one of two.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from autoround.errors import ModelError
from autoround.model.blocks import find_blocks
from autoround.model.calls import CallTemplate as CallTemplate
from autoround.model.calls import Seen, Tape, check_constants
from autoround.model.carry import attach, fold
from autoround.model.load import OpenModel
from autoround.model.media import NO_MEDIA, Media
from autoround.model.record import RecordingModel

# How far equal tensors of batches of different size may lie apart: they are computed by other kernels.
_TOLERANCE = 1e-2


class Captured(NamedTuple):
    """What the blocks are called with.

    Attributes:
        hidden_NTD: hidden states that enter the first block, in the compute dtype.
        templates: one per block, in call order; equal tensors are kept once for all of them.
    """

    hidden_NTD: Tensor
    templates: tuple[CallTemplate, ...]


def capture(
    model: OpenModel,
    tokens_NT: Tensor,
    valid_NT: Tensor,
    *,
    batch_size: int,
    media: Media = NO_MEDIA,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Captured:
    """Record the calls of all blocks; only tensors outside the blocks are read, each when its module is first called.

    Args:
        model: an opened model; its blocks learn to carry what they hand to later ones, see ``attach``.
        tokens_NT: int64 token ids. What is captured is kept on their device.
        valid_NT: bool, False for padding tokens.
        batch_size: rows in a forward; it need not divide N.
        media: what the rows have beside tokens.
        device: where forwards run.
        dtype: floating-point dtype in which they run.

    Raises:
        ModelError: the blocks are not called once each in this order, or the model changes hidden states between them;
            an argument is neither tensor nor constant, has no recognizable batch axis, or depends on the outputs of
            other blocks.
    """
    recording = RecordingModel(model, find_blocks(model.skeleton), torch.device(device), dtype)
    padded = (~valid_NT.all(dim=1)).nonzero().flatten()[:1]
    first = padded.new_full((1,), media.richest)
    last = torch.cat([padded, first[: len(media)]])

    def run(rows_B: Tensor, shift: float = 0.0) -> list[Seen]:
        """Every forward ends with a padded row and one with images, if there are any: then it makes the same calls."""
        rows_B = torch.cat([rows_B, last])
        mask = valid_NT[rows_B] if len(padded) else None
        return recording(tokens_NT[rows_B], mask, shift=shift, media=media.take(rows_B))

    one, two = run(first), run(first.repeat(2), shift=1.0)
    attach(model.skeleton, one)
    if not all(call.follows for call in one):
        recording.part_additions()
        one, two = run(first), run(first.repeat(2), shift=1.0)
        _check_flow(one, two)
    one, two = _folded(one), _folded(two)
    tape = Tape(one, [_batch_axes(*calls) for calls in zip(one, two, strict=True)], tokens_NT.device)
    hidden_NTD = torch.empty(*tokens_NT.shape, *one[0].hidden.shape[2:], dtype=dtype, device=tokens_NT.device)
    for rows_B in torch.arange(len(tokens_NT), device=tokens_NT.device).split(batch_size):
        calls = _folded(run(rows_B))
        hidden_NTD[rows_B] = calls[0].hidden[: len(rows_B)].to(hidden_NTD)
        tape.add(calls, len(rows_B))
    return Captured(hidden_NTD, tape.templates())


def _folded(calls: Sequence[Seen]) -> list[Seen]:
    return [call._replace(hidden=fold(call.hidden)) for call in calls]


def _check_flow(one: Sequence[Seen], two: Sequence[Seen]) -> None:
    """Whatever blocks return, the model adds the same to it."""
    for (before, _), (call, other) in pairwise(zip(one, two, strict=True)):
        added, again = (each.leaves[-1][..., :1, :, :] for each in (call, other))
        if not torch.allclose(added.float(), again.float(), rtol=_TOLERANCE, atol=_TOLERANCE):
            raise ModelError(
                f"{call.block}: found hidden states that the model changes after {before.block}; needed those that it "
                "returned; this model is not supported yet"
            )


def _batch_axes(one: Seen, two: Seen) -> list[int | None]:
    """The batch axis of each leaf, None where there is none, from calls that differ by one row."""
    check_constants(one, two)
    batches = len(one.hidden), len(two.hidden)
    return [
        _batch_axis(f"{one.block}: argument {name}", a, b, batches) if isinstance(a, Tensor) else None
        for name, a, b in zip(one.names, one.leaves, two.leaves, strict=True)
    ]


def _batch_axis(where: str, one: Tensor, two: Tensor, batches: tuple[int, int]) -> int | None:
    changed = [axis for axis, sizes in enumerate(zip(one.shape, two.shape, strict=True)) if sizes[0] != sizes[1]]
    axis = changed[0] if changed else None
    if len(changed) > 1 or (axis is not None and one.shape[axis] * batches[1] != two.shape[axis] * batches[0]):
        shapes = f"{tuple(one.shape)} and {tuple(two.shape)}"
        raise ModelError(f"{where}: found shapes {shapes} for batches of {batches}; needed one batch axis")
    if axis is not None:
        one, two = one.chunk(batches[0], axis)[0], two.chunk(batches[1], axis)[0]
    wide = torch.complex128 if one.is_complex() else torch.float64
    if not torch.allclose(one.to(wide), two.to(wide), rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
        raise ModelError(f"{where}: found a tensor that depends on outputs of other blocks; this is not supported yet")
    return axis
