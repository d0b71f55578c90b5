"""Where parameters start: clips found by an activation-weighted search before any step is taken.

Legend: O output features, I input features, G groups in a row, S columns in a group, C candidates, N groups of a slice,
E experts of a stack.
"""

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from autoround.func.fit import CANDIDATES, Clips, Errors, candidate_errors, fit_blocks, rounding_errors
from autoround.func.rounding import grid_of
from autoround.func.types import BlockWeights, Params, Prepared, RoundingParams
from autoround.spec import GgufSpec, WeightSpec

SHRINKS = tuple(1 - 0.03 * step for step in range(24))
# Where a group is small and its scale free, finer steps and a wider range find scales on whose levels its weights lie.
FINE_SHRINKS = tuple(1.24 - 0.02 * step for step in range(40))
SINGLE_END_FACTORS = (0.7, 0.8, 0.88, 0.94, 1.0, 1.06, 1.12, 1.2)
# Rounded weights computed at a time: candidates x groups x columns.
SLICE_ELEMENTS = 2**20


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
