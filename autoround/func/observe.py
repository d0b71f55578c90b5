"""What the layers of a block are given: mean squares, Hessians, and tokens of experts.

Legend: O output features, I input features, B samples, T tokens, M rows of a layer's inputs, E experts of a stack.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from autoround.func.block import BlockFn
from autoround.func.experts import Routed, by_module, observe, sorted_by_expert
from autoround.func.step import sum_in_pairs
from autoround.func.types import Call

# Side of a tile of a Hessian.
GRAM_COLUMNS = 256

Gram: TypeAlias = Callable[[Tensor, Tensor], None]


class Observed(NamedTuple):
    """What the layers of a block were given.

    Attributes:
        moments: layer path -> float32 (I,), mean square of every input channel over valid tokens; of a stack of experts
            (E, I), over the tokens that each expert took.
        tokens: module of experts -> int64 (E,), tokens that each took.
        hessians: layer path -> float32 (I, I), mean outer product of the inputs of a layer; one tensor for all layers
            that are given the same inputs. Empty unless asked for.
    """

    moments: dict[str, Tensor]
    tokens: dict[str, Tensor]
    hessians: dict[str, Tensor]


def second_moments(
    block_fn: BlockFn, tensors: Mapping[str, Tensor], inputs: Iterable[tuple[Call, Tensor]], paths: Iterable[str]
) -> dict[str, Tensor]:
    """Mean square of every input channel of a block's layers: the diagonal of each layer's Hessian, up to a factor.

    Args:
        block_fn: the lifted block.
        tensors: all its tensors by name.
        inputs: (call, valid_BT) pairs to run the block on.
        paths: the layers to observe.

    Returns:
        path -> float32 (I,), mean over valid tokens; (E, I) for stacks of experts.

    >>> from autoround.func.block import make_block_fn
    >>> block = torch.nn.Sequential(torch.nn.Linear(2, 2))
    >>> x, valid = torch.tensor([[[1.0, 3.0], [9.0, 9.0]]]), torch.tensor([[True, False]])
    >>> second_moments(make_block_fn(block), block.state_dict(), [(Call((x,), {}), valid)], ["0"])["0"].tolist()
    [1.0, 9.0]
    """
    return observe_inputs(block_fn, tensors, inputs, paths).moments


def observe_inputs(
    block_fn: BlockFn,
    tensors: Mapping[str, Tensor],
    inputs: Iterable[tuple[Call, Tensor]],
    paths: Iterable[str],
    *,
    gram: Gram | None = None,
) -> Observed:
    """``second_moments``, how many tokens each expert took, and if asked the Hessians of layers that are no stacks.

    >>> from autoround.func.block import make_block_fn
    >>> block = torch.nn.Sequential(torch.nn.Linear(2, 2))
    >>> x, valid = torch.ones(1, 1, 2), torch.ones(1, 1, dtype=torch.bool)
    >>> observe_inputs(make_block_fn(block), block.state_dict(), [(Call((x,), {}), valid)], ["0"]).tokens
    {}
    """
    return observe_parts(block_fn, tensors, [inputs], paths, gram=gram)


def observe_parts(
    block_fn: BlockFn,
    tensors: Mapping[str, Tensor],
    parts: Sequence[Iterable[tuple[Call, Tensor]]],
    paths: Iterable[str],
    *,
    gram: Gram | None = None,
    total: Callable[[Callable[[int], Any], int, Any], Any] | None = None,
) -> Observed:
    """``observe_inputs`` of all parts, added up as ``sum_in_pairs`` does.

    Args:
        block_fn: the lifted block.
        tensors: all its tensors by name.
        parts: (call, valid_BT) pairs of each part; they are asked for once at most.
        paths: the layers to observe.
        gram: ``add_gram``, or what does the same otherwise, where Hessians are asked for.
        total: as of ``accumulate``, but for trees of which nothing is known before the first part; where it asks for
            some parts only, it asks for one at least.

    >>> from autoround.func.block import make_block_fn
    >>> block, valid = torch.nn.Sequential(torch.nn.Linear(1, 1)), torch.ones(1, 1, dtype=torch.bool)
    >>> parts = [[(Call((torch.full((1, 1, 1), value),), {}), valid)] for value in (1.0, 3.0)]
    >>> observe_parts(make_block_fn(block), block.state_dict(), parts, ["0"]).moments["0"].item()
    5.0
    """
    paths, first = tuple(paths), dict[str, str]()

    def part(index: int) -> _Sums:
        return _summed(block_fn, tensors, parts[index], paths, gram=gram, first=first)

    sums: _Sums = sum_in_pairs(part, 0, len(parts)) if total is None else total(part, len(parts), None)
    count = int(sums.tokens)
    outer = {path: _mirrored(own).div_(max(count, 1)) for path, own in sums.outer.items()}
    squares = {path: own / max(count, 1) for path, own in sums.squares.items()}
    squares |= {path: own.diagonal().clone() for path, own in outer.items()}
    moments = {path: squares[own] for path, own in first.items() if own in squares}
    for module, stacks in by_module(_stacks(block_fn, paths)).items():
        found = sums.routed[module].moments(count) if module in sums.routed else {}
        moments |= {f"{module}.{name}": own for name, own in found.items() if name in stacks}
    tokens = {path: seen.tokens_E for path, seen in sums.routed.items()}
    return Observed(moments, tokens, {path: outer[own] for path, own in first.items() if own in outer})


class _Sums(NamedTuple):
    """Sums over what the layers of a block were given; of layers that are given the same, the first one is named.

    Attributes:
        tokens: int64 (), that are valid.
        squares: layer path -> float32 (I,), of the squares of its inputs; empty where outer products are asked for.
        outer: layer path -> float32 (I, I), of their outer products, in the tiles on and above the diagonal.
        routed: module of experts -> what it has seen.
    """

    tokens: Tensor
    squares: dict[str, Tensor]
    outer: dict[str, Tensor]
    routed: dict[str, Routed]


def _stacks(block_fn: BlockFn, paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(path for path in paths if f"{path}.weight" in block_fn.stacks)


def _summed(
    block_fn: BlockFn,
    tensors: Mapping[str, Tensor],
    inputs: Iterable[tuple[Call, Tensor]],
    paths: tuple[str, ...],
    *,
    gram: Gram | None,
    first: dict[str, str],
) -> _Sums:
    """Sums of one part; ``first`` is told for each layer which one is the first that is given the same."""
    stacks = _stacks(block_fn, paths)
    given: dict[int, tuple[str, Tensor]] = {}  # of the call that is running: id -> first layer, and the tensor
    counts, sums = list[Tensor](), _Sums(torch.empty(0), {}, {}, {})

    def observe_linear(path: str, valid_BT: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        del module  # the hook's signature
        if first.setdefault(path, given.setdefault(id(args[0]), (path, args[0]))[0]) != path:
            return
        _add_layer(sums, path, args[0].flatten(0, -2).float(), valid_BT.flatten().to(args[0].device), gram)

    def observe_experts(
        path: str, valid_BT: Tensor, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> None:
        own = _routed(module, valid_BT, (*args, *kwargs.values()))
        sums.routed[path] = sums.routed[path].add(own) if path in sums.routed else own

    for call, valid_BT in inputs:
        counts.append(valid_BT.sum())
        with ExitStack() as hooks, torch.no_grad():
            for path in paths:
                if path not in stacks:
                    module, hook = block_fn.skeleton.get_submodule(path), partial(observe_linear, path, valid_BT)
                    hooks.callback(module.register_forward_pre_hook(hook).remove)
            for path in by_module(stacks):
                module, own = block_fn.skeleton.get_submodule(path), partial(observe_experts, path, valid_BT)
                hooks.callback(module.register_forward_pre_hook(own, with_kwargs=True).remove)
            block_fn(tensors, call)
        given.clear()
    return sums._replace(tokens=torch.stack(counts).sum())


def _add_layer(sums: _Sums, path: str, x_MI: Tensor, valid_M: Tensor, gram: Gram | None) -> None:
    """What a layer is given in one call."""
    if len(x_MI) % len(valid_M) == 0:  # else its inputs are no tokens, and all of them count
        x_MI = x_MI * valid_M.repeat_interleave(len(x_MI) // len(valid_M)).unsqueeze(-1)
    if gram is None:
        sums.squares[path] = x_MI.square().sum(0).add_(sums.squares.get(path, 0.0))
        return
    if path not in sums.outer:
        sums.outer[path] = x_MI.new_zeros(x_MI.shape[1], x_MI.shape[1])
    gram(sums.outer[path], x_MI)


def _routed(module: nn.Module, valid_BT: Tensor, args: tuple[Tensor, ...]) -> Routed:
    """What a module of experts sees in one call."""
    x, *choices = args
    x_ND, valid_N = x.flatten(0, -2), valid_BT.flatten().to(x.device)
    if choices:
        return observe(module, x_ND, choices[0].flatten(0, -2), valid_N)
    return observe(module, *sorted_by_expert(x_ND, valid_N))


def add_gram(sum_II: Tensor, x_MI: Tensor) -> None:
    """Add ``x.T @ x`` to a sum, in place: the tiles on and above its diagonal only.

    >>> sum_II = torch.zeros(2, 2)
    >>> add_gram(sum_II, torch.tensor([[1.0, 2.0]]))
    >>> sum_II.tolist()
    [[1.0, 2.0], [2.0, 4.0]]
    """
    for start in range(0, len(sum_II), GRAM_COLUMNS):
        own_MI = x_MI[:, start : start + GRAM_COLUMNS]
        sum_II[start : start + GRAM_COLUMNS, start:].addmm_(own_MI.T, x_MI[:, start:])


def _mirrored(sum_II: Tensor) -> Tensor:
    """The same with the tiles below its diagonal."""
    for start in range(0, len(sum_II), GRAM_COLUMNS):
        stop = start + GRAM_COLUMNS
        sum_II[stop:, start:stop] = sum_II[start:stop, stop:].T
    return sum_II
