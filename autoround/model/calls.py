"""The arguments of a block's calls, each distinct tensor kept once, and calls for any choice of samples."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from autoround.errors import ModelError
from autoround.func import Call


@dataclass(frozen=True, slots=True)
class Hidden:
    """Stands for the hidden states among the arguments of a call."""


@dataclass(frozen=True, slots=True)
class Fresh:
    """Stands for an empty mapping of the model's own, in place of which every call is given a new ``dict``."""


class Seen(NamedTuple):
    """One call of one block in one forward.

    Attributes:
        block: its path.
        hidden: the hidden states it was called with.
        names: where each leaf is in ``(args, kwargs)``.
        leaves: flat arguments, ``Hidden`` in place of the hidden states.
        spec: how the leaves nest: as ``(args, kwargs)``, or ``(args, kwargs, added)`` where the model added something
            to the hidden states that the block before returned.
        follows: whether the hidden states are those that the block before it returned.
    """

    block: str
    hidden: Tensor
    names: tuple[str, ...]
    leaves: tuple[Any, ...]
    spec: TreeSpec
    follows: bool


class Shared(NamedTuple):
    """A tensor argument that is the same for all samples."""

    tensor: Tensor


class PerSample(NamedTuple):
    """A tensor argument with one slice per sample.

    Attributes:
        slices: the distinct slices; along the batch axis they have one entry, or several as (batch * heads) would.
        place: which of them each of the N samples has.
        axis: the batch axis.
    """

    slices: tuple[Tensor, ...]
    place: tuple[int, ...]
    axis: int

    def take(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """The tensor for these samples; a view without copies where all samples have the same slice."""
        first = self.slices[0]
        if len(self.slices) == 1 and first.shape[self.axis] == 1:
            return first.to(device).expand(*(len(rows) if axis == self.axis else -1 for axis in range(first.ndim)))
        return torch.cat([self.slices[self.place[row]] for row in rows], dim=self.axis).to(device)


@dataclass(frozen=True, eq=False, slots=True)
class CallTemplate:
    """The arguments of one block for all samples, but for the hidden states.

    Attributes:
        leaves: flat arguments: ``Hidden``, ``Fresh``, ``Shared``, ``PerSample`` or a constant.
        spec: how they nest, as ``(args, kwargs)`` or ``(args, kwargs, added)``.
    """

    leaves: tuple[Any, ...]
    spec: TreeSpec

    @property
    def hidden(self) -> int:
        """Which leaf of a call is the hidden states."""
        before = self.leaves[: self.leaves.index(Hidden())]
        return sum(not isinstance(leaf, Fresh) for leaf in before)  # an empty mapping has no leaves

    def bind(self, hidden_BTD: Tensor, rows_B: Tensor) -> Call:
        """Build the call for some samples.

        Args:
            hidden_BTD: hidden states of these samples; the other tensors are moved to their device.
            rows_B: int64, indices of the samples in the captured set.
        """
        rows, device = rows_B.tolist(), hidden_BTD.device

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Hidden):
                return hidden_BTD + fill(self.leaves[-1]) if self.spec.num_children == 3 else hidden_BTD
            if isinstance(leaf, PerSample):
                return leaf.take(rows, device)
            if isinstance(leaf, Fresh):
                return {}
            return leaf.tensor.to(device) if isinstance(leaf, Shared) else leaf

        args, kwargs, *_ = tree_unflatten([fill(leaf) for leaf in self.leaves], self.spec)
        return Call(args, kwargs)


class Tape:
    """Collects the calls of many forwards, whose constants must all be the same.

    Args:
        pattern: the calls of any forward.
        axes: for each block and leaf the batch axis, None where there is none.
        device: where tensors are kept.
    """

    def __init__(self, pattern: Sequence[Seen], axes: Sequence[Sequence[int | None]], device: torch.device) -> None:
        self._pattern, self._axes, self._device = pattern, axes, device
        self._kept: dict[bytes, Tensor] = {}
        self._digests: list[list[list[bytes]]] = [[[] for _ in call.leaves] for call in pattern]

    def add(self, calls: Sequence[Seen], rows: int) -> None:
        """Note the calls of one forward, of which the first ``rows`` samples count.

        Raises:
            ModelError: a constant is not the same as in other forwards.
        """
        batch = len(calls[0].hidden)
        done: dict[tuple[int, int | None], list[bytes]] = {}
        for call, pattern, axes, digests in zip(calls, self._pattern, self._axes, self._digests, strict=True):
            check_constants(pattern, call)
            for leaf, axis, noted in zip(call.leaves, axes, digests, strict=True):
                if isinstance(leaf, Tensor):
                    key = (id(leaf), axis)
                    if key not in done:
                        done[key] = self._keep(leaf, axis, rows, batch)
                    noted.extend(done[key])

    def templates(self) -> tuple[CallTemplate, ...]:
        """One template per block.

        Raises:
            ModelError: a tensor without batch axis differs between forwards.
        """
        known: dict[tuple[int | None, tuple[bytes, ...]], Shared | PerSample] = {}
        templates = []
        for call, axes, digests in zip(self._pattern, self._axes, self._digests, strict=True):
            leaves = []
            for name, leaf, axis, noted in zip(call.names, call.leaves, axes, digests, strict=True):
                key = (axis, tuple(noted))
                if isinstance(leaf, Tensor) and key not in known:
                    known[key] = _join(f"{call.block}: argument {name}", self._kept, noted, axis)
                leaves.append(known[key] if isinstance(leaf, Tensor) else leaf)
            templates.append(CallTemplate(tuple(leaves), call.spec))
        return tuple(templates)

    def _keep(self, leaf: Tensor, axis: int | None, rows: int, batch: int) -> list[bytes]:
        """Digests of a tensor, or of its slices for the first rows of a batch."""
        if axis is None:
            return [self._keep_one(leaf)]
        slices = leaf.chunk(batch, dim=axis)
        if leaf.stride(axis) == 0:
            return [self._keep_one(slices[0])] * rows
        return [self._keep_one(each) for each in slices[:rows]]

    def _keep_one(self, tensor: Tensor) -> bytes:
        data = tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().data
        hashed = hashlib.sha256(f"{tuple(tensor.shape)}:{tensor.dtype}".encode())
        hashed.update(data)
        digest = hashed.digest()
        if digest not in self._kept:
            self._kept[digest] = tensor.to(self._device).clone(memory_format=torch.contiguous_format)
        return digest


def _join(where: str, kept: Mapping[bytes, Tensor], digests: list[bytes], axis: int | None) -> Shared | PerSample:
    place = {digest: index for index, digest in enumerate(dict.fromkeys(digests))}
    tensors = tuple(kept[digest] for digest in place)
    if axis is not None:
        return PerSample(tensors, tuple(place[digest] for digest in digests), axis)
    if len(tensors) > 1:
        raise ModelError(
            f"{where}: found a tensor that differs between batches and has no batch axis; this is not supported yet"
        )
    return Shared(tensors[0])


def check_constants(one: Seen, two: Seen) -> None:
    """Raise ModelError if two calls of a block differ in anything but their tensors."""
    if one.spec != two.spec:
        raise ModelError(f"{one.block}: found arguments {one.names} and {two.names}; needed the same for all batches")
    for name, *pair in zip(one.names, one.leaves, two.leaves, strict=True):
        kinds = [Tensor if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in pair]
        if kinds[0] != kinds[1]:
            raise ModelError(
                f"{one.block}: argument {name}: found {pair[0]} and {pair[1]}; needed the same for all batches"
            )
