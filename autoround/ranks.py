"""Processes that share a run: what each computes, what they tell each other, and how they notice that one went astray.

Whatever is added up is added in an order that does not depend on how many they are.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_flatten, tree_unflatten

from autoround import func
from autoround.errors import AutoRoundError, UsageError
from autoround.launch import Launch
from autoround.sealed import digest

# The first rank may read text or write files for a long time; where one ends, torchrun ends the others.
PATIENCE = timedelta(days=7)
# What moves tensors of each kind of device; gloo moves the host's.
_MOVERS: Mapping[str, str] = {
    "cpu": "gloo",
    "cuda": "cpu:gloo,cuda:nccl",
    "xpu": "cpu:gloo,xpu:xccl",
    "hpu": "cpu:gloo,hpu:hccl",
}

T = TypeVar("T")


class Ranks(Protocol):
    """All processes of a run, as one of them sees them. All of them make the same calls in the same order.

    Attributes:
        rank: of this one, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    def tell(self, value: T, source: int = 0) -> T:
        """What one rank gave, the first one where nothing else is said."""
        ...

    def gather(self, value: T) -> list[T]:
        """What every rank gave, in their order."""
        ...

    def share(self, owners: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Fill each tensor, which is contiguous, with what the rank that owns it has there."""
        ...


class Alone:
    """A run of one process, which needs nobody."""

    rank, size = 0, 1

    def tell(self, value: T, source: int = 0) -> T:
        """It has it."""
        return value

    def gather(self, value: T) -> list[T]:
        """Its own."""
        return [value]

    def share(self, owners: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """It has them."""


ALONE = Alone()


class Group:
    """The processes that torchrun started, through torch.distributed."""

    def __init__(self, launch: Launch) -> None:
        self.rank, self.size = launch.rank, launch.size

    def tell(self, value: T, source: int = 0) -> T:
        """By way of the host's memory, whatever it is."""
        found = [value]
        distributed.broadcast_object_list(found, src=source, device=torch.device("cpu"))
        return found[0]

    def gather(self, value: T) -> list[T]:
        """Each tells in turn."""
        return [self.tell(value, rank) for rank in range(self.size)]

    def share(self, owners: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """All at once, byte for byte."""
        works = [
            distributed.broadcast(tensor.view(torch.uint8), src=owner, async_op=True)
            for owner, tensor in zip(owners, tensors, strict=True)
            if tensor.numel()
        ]
        for work in works:
            work.wait()


def join(launch: Launch | None, kind: str) -> Ranks:
    """Meet the other processes of a run.

    Args:
        launch: the place of this one; None where it is alone.
        kind: torch device type on which blocks run.
    """
    if launch is None or launch.size == 1:
        return ALONE
    if not distributed.is_initialized():
        distributed.init_process_group(_MOVERS[kind], timeout=PATIENCE)
    return Group(launch)


def owners(count: int, size: int) -> list[int]:
    """The rank of each of so many pieces of work: neighbours share one.

    >>> owners(4, 2), owners(5, 2)
    ([0, 0, 1, 1], [0, 0, 0, 1, 1])
    """
    return [index * size // count for index in range(count)]


def turns(start: int, stop: int, size: int) -> list[range]:
    """Blocks that are tuned at the same time: neighbours, as many as there are ranks.

    >>> turns(1, 6, 2)
    [range(1, 3), range(3, 5), range(5, 6)]
    """
    return [range(first, min(first + size, stop)) for first in range(start, stop, size)]


def owners_by_size(sizes: Mapping[str, int], size: int) -> dict[str, int]:
    """The rank of each of some pieces of work of different sizes: neighbours share one, all have about as much.

    >>> owners_by_size({"q": 1, "k": 1, "v": 1, "up": 3}, 2)
    {'q': 0, 'k': 0, 'v': 0, 'up': 1}
    """
    total, before, found = sum(sizes.values()), 0, {}
    for name, own in sizes.items():
        found[name] = (2 * before + own) * size // (2 * total)  # where its middle lies
        before += own
    return found


def summed(ranks: Ranks, part: Callable[[int], Any], count: int, like: Any = None) -> Any:
    """The sum of parts of which each rank computes some; the same bits on every rank, and for every number of ranks.

    Ranks add up what is theirs alone, and tell each other such sums.

    Args:
        ranks: all processes.
        part: index -> tree of tensors on one device, float32 or of whole numbers below 2**24.
        count: how many parts there are.
        like: a tree with tensors of the same shapes and dtypes, on the same device; not needed where every rank has a
            part.
    """
    if ranks.size == 1:
        return func.sum_in_pairs(part, 0, count)
    spans = func.owned_spans(owners(count, ranks.size))
    known = {span: func.sum_in_pairs(part, *span) for span, owner in spans.items() if owner == ranks.rank}
    leaves, tree = tree_flatten(next(iter(known.values())) if like is None else like)
    sizes, device = [leaf.numel() for leaf in leaves], leaves[0].device
    flat = {
        span: torch.cat([leaf.flatten().float() for leaf in tree_flatten(known[span])[0]])
        if span in known
        else torch.empty(sum(sizes), device=device)
        for span in spans
    }
    ranks.share(list(spans.values()), list(flat.values()))
    for span in spans.keys() - known.keys():
        own = zip(flat[span].split(sizes), leaves, strict=True)
        known[span] = tree_unflatten([sums.view_as(leaf).to(leaf.dtype) for sums, leaf in own], tree)
    return func.sum_in_pairs(part, 0, count, known)


def agree(ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """Refuse to begin where ranks were told different things.

    Raises:
        UsageError: names the first rank that differs, and what.
    """
    first, *others = ranks.gather(dict(facts))
    for rank, own in enumerate(others, start=1):
        for name in first:
            if own[name] != first[name]:
                raise UsageError(
                    f"rank {rank}: {name}: found {own[name]!r}; needed {first[name]!r}, as rank 0 has; start all ranks "
                    "with the same command on machines of one kind"
                )


def compare(ranks: Ranks, where: str, codes: Mapping[str, func.Codes]) -> None:
    """Check that all ranks have the same codes.

    Args:
        ranks: all processes.
        where: what the codes are of, for the message.
        codes: layer path -> codes.

    Raises:
        AutoRoundError: names the ranks whose codes differ from those that most have, or else from the first one's.
    """
    if ranks.size == 1:
        return
    hashes = ranks.gather(digest(_named(codes)))
    usual = Counter(hashes).most_common(1)[0][0]  # of equal counts the one that comes first
    if astray := [str(rank) for rank, found in enumerate(hashes) if found != usual]:
        raise AutoRoundError(
            f"{where}: found other codes on rank {', '.join(astray)} than on the others; needed the same on all; "
            "finished blocks are kept: start again, and check the memory and software of that machine"
        )


def _named(codes: Mapping[str, func.Codes]) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(codes):
        yield from ((f"{path}.{name}", tensor) for name, tensor in codes[path]._asdict().items())
