"""Where parameters start: clips found by an activation-weighted search before any step is taken.

Legend: O output features, I input features, G groups in a row, S columns in a group, B samples, T tokens.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TypeAlias

import torch
from einops import rearrange
from torch import Tensor

from autoround.func.block import BlockFn
from autoround.func.grids import int as int_grid
from autoround.func.types import BlockWeights, Call, Params, Prepared, RoundingParams
from autoround.spec import QuantSpec

Clips: TypeAlias = tuple[Tensor, Tensor]
Errors: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, QuantSpec], Tensor]

SHRINKS = tuple(1 - 0.03 * step for step in range(24))
SINGLE_END_FACTORS = (0.7, 0.8, 0.88, 0.94, 1.0, 1.06, 1.12, 1.2)
# Rounded weights computed at a time: candidates x groups x columns.
SLICE_ELEMENTS = 2**20


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
        path -> float32 (I,), mean over valid tokens.

    >>> from autoround.func.block import make_block_fn
    >>> block = torch.nn.Sequential(torch.nn.Linear(2, 2))
    >>> x, valid = torch.tensor([[[1.0, 3.0], [9.0, 9.0]]]), torch.tensor([[True, False]])
    >>> second_moments(make_block_fn(block), block.state_dict(), [(Call((x,), {}), valid)], ["0"])["0"].tolist()
    [1.0, 9.0]
    """
    sums: dict[str, Tensor] = {}
    count = 0

    def observe(path: str, valid_BT: Tensor, module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        del module  # the hook's signature
        x_I = (args[0].float().square() * valid_BT.unsqueeze(-1)).flatten(0, -2).sum(0)
        sums[path] = sums[path] + x_I if path in sums else x_I

    for call, valid_BT in inputs:
        count += int(valid_BT.sum())
        with ExitStack() as hooks, torch.no_grad():
            for path in paths:
                module = block_fn.skeleton.get_submodule(path)
                hooks.callback(module.register_forward_pre_hook(partial(observe, path, valid_BT)).remove)
            block_fn(tensors, call)
    return {path: total / max(count, 1) for path, total in sums.items()}


def search_params(
    weights: BlockWeights,
    moments: Mapping[str, Tensor],
    specs: Mapping[str, QuantSpec],
    *,
    errors: Errors | None = None,
) -> Params:
    """``search_clips`` for every weight of a block; layers without moments weigh all their channels alike.

    >>> from autoround.func.block import split_tensors
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
    prepared: Prepared, moment_I: Tensor | None, spec: QuantSpec, *, errors: Errors | None = None
) -> RoundingParams:
    """Clips that minimize each group's rounding error, weighted by the mean square of its inputs; offsets are 0.

    Tried are both ends shrunk together, then each alone; on the symmetric grid both signs of the scale. The error is
    ``sum_s moment_s * (w_s - fake_quantize(w)_s)**2``, the layer's output error if input channels were uncorrelated.

    Args:
        prepared: from ``prepare`` with the same spec.
        moment_I: float32 >= 0 (I,), or None for all ones.
        errors: ``rounding_errors``, or a compiled version of it; it is called with slices of one shape per group size.

    >>> spec = QuantSpec(bits=2, group_size=8)
    >>> prepared = int_grid.prepare(torch.tensor([[-1.0, 0.3, -0.3, 0.2, 0.3, -0.2, 0.3, -0.3]]), spec)
    >>> search_clips(prepared, torch.tensor([0.01, 1, 1, 1, 1, 1, 1, 1]), spec).clip_min_OG.item() < 1
    True
    """
    errors = errors or rounding_errors
    rows, groups, size = prepared.weight_OGS.shape
    moment_OGS = prepared.weight_OGS.new_ones(groups, size).expand(rows, groups, size)
    if moment_I is not None:
        moment_OGS = rearrange(moment_I, "(g s) -> g s", s=size).expand(rows, groups, size)
    length = max(1, SLICE_ELEMENTS // (2 * len(SHRINKS) * size))
    found = []
    for start in range(0, rows * groups, length):
        part, moment_NS = _slice(prepared, moment_OGS, start, length)
        clips = _choose(part, _coarse_candidates(part, spec), moment_NS, spec, errors)
        if not spec.sym:
            clips = _choose(part, _fine_candidates(clips), moment_NS, spec, errors)
        found.append(clips)
    clip_min_OG, clip_max_OG = (
        torch.cat(ends)[: rows * groups].view(rows, groups) for ends in zip(*found, strict=True)
    )
    return RoundingParams(torch.zeros_like(prepared.weight_OGS), clip_min_OG, clip_max_OG)


def rounding_errors(weight_NS: Tensor, scale_KN: Tensor, zero_KN: Tensor, moment_NS: Tensor, spec: QuantSpec) -> Tensor:
    """Weighted squared error of N groups rounded with each of K scales and zero points, (K, N).

    >>> weight_NS, moment_NS = torch.tensor([[0.5, 2.0]]), torch.tensor([[4.0, 1.0]])
    >>> scale_KN, zero_KN = torch.tensor([[1.0], [0.5]]), torch.tensor([[2.0], [2.0]])
    >>> rounding_errors(weight_NS, scale_KN, zero_KN, moment_NS, QuantSpec(bits=2)).tolist()
    [[2.0], [2.25]]
    """
    q_KNS = int_grid.round_codes(weight_NS, 0.0, scale_KN, zero_KN, spec)
    error_KNS = scale_KN.unsqueeze(-1) * (q_KNS - zero_KN.unsqueeze(-1)) - weight_NS
    return (error_KNS.square() * moment_NS).sum(-1)


def _choose(prepared: Prepared, candidates: Clips, moment_NS: Tensor, spec: QuantSpec, errors: Errors) -> Clips:
    """For each of N groups the candidate, out of K, with the least error: (clip_min_N, clip_max_N)."""
    scale_KN, zero_KN = int_grid.scale_and_zero(prepared, RoundingParams(prepared.weight_OGS, *candidates), spec)
    best_1N = errors(prepared.weight_OGS[0], scale_KN, zero_KN, moment_NS, spec).argmin(0, keepdim=True)
    return candidates[0].gather(0, best_1N)[0], candidates[1].gather(0, best_1N)[0]


def _slice(prepared: Prepared, moment_OGS: Tensor, start: int, length: int) -> tuple[Prepared, Tensor]:
    """Groups start … start + length as one row, padded with copies of the last so that every slice has one shape."""
    rows, groups, _ = prepared.weight_OGS.shape
    index_N = torch.arange(start, start + length, device=moment_OGS.device).clamp(max=rows * groups - 1)
    row_N, group_N = index_N // groups, index_N % groups
    return Prepared(*(field[row_N, group_N].unsqueeze(0) for field in prepared)), moment_OGS[row_N, group_N]


def _coarse_candidates(prepared: Prepared, spec: QuantSpec) -> Clips:
    """Both ends shrunk alike; on the symmetric grid each end in turn is the one that sets the scale and its sign."""
    shrink_K1 = torch.tensor(SHRINKS, device=prepared.lo_OG.device).unsqueeze(-1)
    clip_KN = shrink_K1 * torch.ones_like(prepared.lo_OG)
    if not spec.sym:
        return clip_KN, clip_KN
    lo_1N, hi_1N = -prepared.lo_OG, prepared.hi_OG
    below_lo_KN = _below(shrink_K1 * lo_1N, hi_1N)
    below_hi_KN = _below(shrink_K1 * hi_1N, lo_1N)
    return torch.cat([clip_KN, below_hi_KN]), torch.cat([below_lo_KN, clip_KN])


def _below(limit_KN: Tensor, end_1N: Tensor) -> Tensor:
    """Largest clip, at most 1, that keeps an end just below a limit."""
    return (0.99 * limit_KN / end_1N.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1)


def _fine_candidates(clips: Clips) -> Clips:
    """Each end moved a little alone."""
    factor_K1 = torch.tensor(SINGLE_END_FACTORS, device=clips[0].device).unsqueeze(-1)
    moved_min_KN, moved_max_KN = ((clip_N * factor_K1).clamp(max=1) for clip_N in clips)
    clip_min_KN, clip_max_KN = clips[0].expand_as(moved_min_KN), clips[1].expand_as(moved_max_KN)
    return torch.cat([moved_min_KN, clip_min_KN]), torch.cat([clip_max_KN, moved_max_KN])
