"""Where parameters start: clips found by an activation-weighted search before any step is taken.

Legend: O output features, I input features, G groups in a row, S columns in a group, C candidates, N groups of a slice,
B samples, T tokens, M rows of a layer's inputs, E experts of a stack.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn

from autoround.func.block import BlockFn
from autoround.func.experts import Routed, by_module, observe, sorted_by_expert
from autoround.func.fit import CANDIDATES, Clips, Errors, candidate_errors, fit_blocks, rounding_errors
from autoround.func.rounding import grid_of
from autoround.func.step import sum_in_pairs
from autoround.func.types import BlockWeights, Call, Params, Prepared, RoundingParams
from autoround.spec import GgufSpec, WeightSpec

SHRINKS = tuple(1 - 0.03 * step for step in range(24))
# Where a group is small and its scale free, finer steps and a wider range find scales on whose levels its weights lie.
FINE_SHRINKS = tuple(1.24 - 0.02 * step for step in range(40))
SINGLE_END_FACTORS = (0.7, 0.8, 0.88, 0.94, 1.0, 1.06, 1.12, 1.2)
# Rounded weights computed at a time: candidates x groups x columns.
SLICE_ELEMENTS = 2**20
# Side of a tile of a Hessian.
GRAM_COLUMNS = 256

Gram: TypeAlias = Callable[[Tensor], Tensor]


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
        gram: inputs (M, I) of a layer -> sum of their outer products (I, I), where Hessians are asked for.
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
    squares, outer = ({path: own / max(count, 1) for path, own in each.items()} for each in (sums.squares, sums.outer))
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
        squares: layer path -> float32 (I,), of the squares of its inputs.
        outer: layer path -> float32 (I, I), of their outer products; empty unless asked for.
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
        x_MI, valid_M = args[0].flatten(0, -2).float(), valid_BT.flatten().to(args[0].device)
        if len(x_MI) % len(valid_M) == 0:  # else its inputs are no tokens, and all of them count
            x_MI = x_MI * valid_M.repeat_interleave(len(x_MI) // len(valid_M)).unsqueeze(-1)
        _add(sums.squares, path, x_MI.square().sum(0))
        if gram is not None:
            _add(sums.outer, path, gram(x_MI))

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


def _routed(module: nn.Module, valid_BT: Tensor, args: tuple[Tensor, ...]) -> Routed:
    """What a module of experts sees in one call."""
    x, *choices = args
    x_ND, valid_N = x.flatten(0, -2), valid_BT.flatten().to(x.device)
    if choices:
        return observe(module, x_ND, choices[0].flatten(0, -2), valid_N)
    return observe(module, *sorted_by_expert(x_ND, valid_N))


def gram_in_tiles(x_MI: Tensor) -> Tensor:
    """``x.T @ x``, of which only the upper triangle of its tiles is multiplied out.

    >>> gram_in_tiles(torch.tensor([[1.0, 2.0]])).tolist()
    [[1.0, 2.0], [2.0, 4.0]]
    """
    gram_II = x_MI.new_empty(x_MI.shape[1], x_MI.shape[1])
    for start in range(0, len(gram_II), GRAM_COLUMNS):
        stop = start + GRAM_COLUMNS
        gram_II[start:stop, start:] = x_MI[:, start:stop].T @ x_MI[:, start:]
        gram_II[stop:, start:stop] = gram_II[start:stop, stop:].T
    return gram_II


def _add(sums: dict[str, Tensor], key: str, term: Tensor) -> None:
    sums[key] = sums[key].add_(term) if key in sums else term


def search_params(
    weights: BlockWeights,
    moments: Mapping[str, Tensor],
    specs: Mapping[str, WeightSpec],
    *,
    errors: Errors | None = None,
) -> Params:
    """``search_clips`` for every weight of a block; layers without moments weigh all their channels alike.

    >>> from autoround.func.block import split_tensors
    >>> from autoround.spec import QuantSpec
    >>> specs = {"up": QuantSpec(bits=2, group_size=4)}
    >>> weights = split_tensors({"up.weight": torch.tensor([[1.0, 2.0, 3.0, 4.0]])}, specs)
    >>> search_params(weights, {}, specs)["up"].offset_OGS.tolist()
    [[[0.0, 0.0, 0.0, 0.0]]]
    """
    return {
        path: search_clips(prepared, moments.get(path), specs[path], errors=errors)
        for path, prepared in weights.tuned.items()
    }


def search_clips(
    prepared: Prepared, moment_I: Tensor | None, spec: WeightSpec, *, errors: Errors | None = None
) -> RoundingParams:
    """Clips that minimize each group's rounding error, weighted by the mean square of its inputs; offsets are 0.

    Tried are both ends shrunk together, then each alone; on symmetric grids both signs of the scale. The error is
    ``sum_s moment_s * (w_s - fake_quantize(w)_s)**2``, the layer's output error if input channels were uncorrelated.
    Blocks of GGUF types are then fitted as wholes (``fit_blocks``).

    Args:
        prepared: from ``prepare`` with the same spec.
        moment_I: float32 >= 0 (I,), or (E, I) where equal shares of the rows belong to each of E experts; None for all
            ones.
        errors: ``rounding_errors``, or a compiled version of it; it is called with slices of one shape per group size.

    >>> from autoround.func.rounding import prepare
    >>> from autoround.spec import QuantSpec
    >>> spec = QuantSpec(bits=2, group_size=8)
    >>> prepared = prepare(torch.tensor([[-1.0, 0.3, -0.3, 0.2, 0.3, -0.2, 0.3, -0.3]]), spec)
    >>> search_clips(prepared, torch.tensor([0.01, 1, 1, 1, 1, 1, 1, 1]), spec).clip_min_OG.item() < 1
    True
    """
    errors = errors or rounding_errors
    rows, groups, size = prepared.weight_OGS.shape
    moment_EGS = prepared.weight_OGS.new_ones(1, groups, size)
    if moment_I is not None:
        moment_EGS = rearrange(moment_I.view(-1, groups * size), "e (g s) -> e g s", s=size)
        unused_EG1 = moment_EGS.sum(-1, keepdim=True) == 0  # where all errors were 0, any clips would be best
        moment_EGS = torch.where(unused_EG1, 1.0, moment_EGS)
    length = max(1, SLICE_ELEMENTS // (CANDIDATES * size * spec.block_groups)) * spec.block_groups
    found = []
    for start in range(0, rows * groups, length):
        part, moment_NS = _slice(prepared, moment_EGS, start, length)
        clips = _choose(part, _coarse_candidates(part, spec), moment_NS, spec, errors)
        for _ in range(0 if spec.sym else 1 + isinstance(spec, GgufSpec)):
            clips = _choose(part, _fine_candidates(clips, spec), moment_NS, spec, errors)
        if isinstance(spec, GgufSpec):
            clips = fit_blocks(part, clips, moment_NS, spec, errors)
        found.append(clips)
    clip_min_OG, clip_max_OG = (
        torch.cat(ends)[: rows * groups].view(rows, groups) for ends in zip(*found, strict=True)
    )
    return RoundingParams(torch.zeros_like(prepared.weight_OGS), clip_min_OG, clip_max_OG)


def _choose(prepared: Prepared, candidates: Clips, moment_NS: Tensor, spec: WeightSpec, errors: Errors) -> Clips:
    """For each of N groups the candidate, out of C, with the least error: (clip_min_N, clip_max_N)."""
    scale_CN, shift_CN = grid_of(spec).ranges(prepared, RoundingParams(prepared.weight_OGS, *candidates), spec)
    error_CN = candidate_errors(errors, prepared.weight_OGS[0], scale_CN, shift_CN, moment_NS, spec)
    best_1N = error_CN.argmin(0, keepdim=True)
    return candidates[0].gather(0, best_1N)[0], candidates[1].gather(0, best_1N)[0]


def _slice(prepared: Prepared, moment_EGS: Tensor, start: int, length: int) -> tuple[Prepared, Tensor]:
    """Groups start … start + length as one row, padded with copies of the last so that every slice has one shape."""
    rows, groups, _ = prepared.weight_OGS.shape
    index_N = torch.arange(start, start + length, device=moment_EGS.device).clamp(max=rows * groups - 1)
    row_N, group_N = index_N // groups, index_N % groups
    own = Prepared(*(field[row_N, group_N].unsqueeze(0) for field in prepared))
    return own, moment_EGS[row_N // (rows // len(moment_EGS)), group_N]


def _coarse_candidates(prepared: Prepared, spec: WeightSpec) -> Clips:
    """Both ends shrunk alike; on symmetric grids each end in turn is the one that sets the scale and its sign."""
    shrinks = FINE_SHRINKS if spec.sym and isinstance(spec, GgufSpec) else SHRINKS
    shrink_C1 = torch.tensor(shrinks, device=prepared.lo_OG.device).unsqueeze(-1)
    clip_CN = shrink_C1 * torch.ones_like(prepared.lo_OG)
    if not spec.sym:
        return clip_CN, clip_CN
    lo_1N, hi_1N = -prepared.lo_OG, prepared.hi_OG
    below_lo_CN = _below(shrink_C1 * lo_1N, hi_1N)
    below_hi_CN = _below(shrink_C1 * hi_1N, lo_1N)
    return torch.cat([clip_CN, below_hi_CN]), torch.cat([below_lo_CN, clip_CN])


def _below(limit_CN: Tensor, end_1N: Tensor) -> Tensor:
    """Largest clip, at most 1, that keeps an end just below a limit."""
    return (0.99 * limit_CN / end_1N.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1)


def _fine_candidates(clips: Clips, spec: WeightSpec) -> Clips:
    """Each end moved a little alone."""
    most = grid_of(spec).CLIP_RANGE[1]
    factor_C1 = torch.tensor(SINGLE_END_FACTORS, device=clips[0].device).unsqueeze(-1)
    moved_min_CN, moved_max_CN = ((clip_N * factor_C1).clamp(max=most) for clip_N in clips)
    clip_min_CN, clip_max_CN = clips[0].expand_as(moved_min_CN), clips[1].expand_as(moved_max_CN)
    return torch.cat([moved_min_CN, clip_min_CN]), torch.cat([clip_max_CN, moved_max_CN])
