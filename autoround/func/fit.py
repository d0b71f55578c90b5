"""Scales of GGUF blocks that minimize an activation-weighted rounding error, and that error itself.

Legend: S columns in a group, C candidates, N groups of a slice, B groups in a block, M blocks of a slice (N = M * B).
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from einops import rearrange
from torch import Tensor

from autoround.func.grids.gguf import CLIP_RANGE, factors, ranges, round_codes
from autoround.func.rounding import grid_of
from autoround.func.types import Prepared, RoundingParams
from autoround.spec import GgufSpec, WeightSpec

Clips: TypeAlias = tuple[Tensor, Tensor]
Scales: TypeAlias = tuple[Tensor, Tensor]
Errors: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, WeightSpec], Tensor]

# Candidates that ``errors`` sees at a time, so that a compiled one is compiled once for every search.
CANDIDATES = 8
LEAST_SQUARES_ROUNDS = 3
# Levels of a scale or minimum that are tried, relative to the nearest.
NEIGHBOURS = (0, -1, 1, -2, 2)
# Factors of blocks that are tried, relative to the one at hand, with the nearest levels of each.
TURNS = (1.0, 0.9, 0.92, 0.94, 0.96, 0.98, 1.02, 1.04)
NEAREST = (0, -1, 1)
FACTOR_ROUNDS = 2


def rounding_errors(
    weight_NS: Tensor, scale_CN: Tensor, shift_CN: Tensor, moment_NS: Tensor, spec: WeightSpec
) -> Tensor:
    """Weighted squared error of N groups rounded with each of C scales and shifts, (C, N).

    >>> from autoround.spec import QuantSpec
    >>> weight_NS, moment_NS = torch.tensor([[0.5, 2.0]]), torch.tensor([[4.0, 1.0]])
    >>> scale_CN, zero_CN = torch.tensor([[1.0], [0.5]]), torch.tensor([[2.0], [2.0]])
    >>> rounding_errors(weight_NS, scale_CN, zero_CN, moment_NS, QuantSpec(bits=2)).tolist()
    [[2.0], [2.25]]
    """
    grid = grid_of(spec)
    q_CNS = grid.round_codes(weight_NS, 0.0, scale_CN, shift_CN, spec)
    error_CNS = grid.values(q_CNS, scale_CN, shift_CN, spec) - weight_NS
    return (error_CNS.square() * moment_NS).sum(-1)


def candidate_errors(
    errors: Errors, weight_NS: Tensor, scale_CN: Tensor, shift_CN: Tensor, moment_NS: Tensor, spec: WeightSpec
) -> Tensor:
    """``errors`` over any number of candidates, ``CANDIDATES`` at a time.

    >>> from autoround.spec import QuantSpec
    >>> ones_CN = torch.ones(9, 1)
    >>> candidate_errors(rounding_errors, torch.ones(1, 2), ones_CN, ones_CN, torch.ones(1, 2), QuantSpec(bits=2)).shape
    torch.Size([9, 1])
    """
    count = len(scale_CN)
    padded = [torch.cat([own, own[-1:].expand(-count % CANDIDATES, -1)]) for own in (scale_CN, shift_CN)]
    parts = zip(*(torch.split(own, CANDIDATES) for own in padded), strict=True)
    return torch.cat([errors(weight_NS, scale, shift, moment_NS, spec) for scale, shift in parts])[:count]


def fit_blocks(part: Prepared, clips: Clips, moment_NS: Tensor, spec: GgufSpec, errors: Errors) -> Clips:
    """Better clips for groups of whole GGUF blocks.

    First each group's scale and minimum are fitted to its codes by weighted least squares, over and over. Where blocks
    store them as integers, the factors of a block are then searched and fitted with the nearest integers of its groups,
    so that a group whose inputs are huge decides; then each group's integers are searched by the error that remains.

    Args:
        part: N groups as one row.
        clips: (clip_min_N, clip_max_N) to start from.
        moment_NS: float32 >= 0, weight of each column's squared error.
        spec: the type of the blocks.
        errors: ``rounding_errors``, or a compiled version of it.

    >>> from autoround.func.rounding import prepare
    >>> spec = GgufSpec(type="q4_k")
    >>> part, clips = prepare(torch.linspace(-1, 1, 256)[None], spec), (torch.ones(8), torch.ones(8))
    >>> fit_blocks(part, clips, torch.ones(8, 32), spec, rounding_errors)[0].shape
    torch.Size([8])
    """
    own = _Fit(part.weight_OGS[0], moment_NS, spec, errors)
    scales = own.least_squares(_scales_of(part, clips, spec))
    if spec.layout.scale_bits:
        for _ in range(FACTOR_ROUNDS):
            scales = own.solved(own.turned(scales))
        scales = own.levels(scales)
    return _clips_of(part, scales, spec)


class _Fit:
    """The data of one slice, and the searches over its scales (scale_N, min_N)."""

    def __init__(self, weight_NS: Tensor, moment_NS: Tensor, spec: GgufSpec, errors: Errors) -> None:
        self._weight_NS, self._moment_NS, self._spec, self._errors = weight_NS, moment_NS, spec, errors

    def least_squares(self, scales: Scales) -> Scales:
        """Fit scales to codes and codes to scales in turn; the best of all rounds."""
        rounds = [scales]
        for _ in range(LEAST_SQUARES_ROUNDS):
            rounds.append(self._fitted(rounds[-1]))
        scale_CN, min_CN = (torch.stack(own) for own in zip(*rounds, strict=True))
        return self._best(scale_CN, min_CN)

    def turned(self, scales: Scales) -> Scales:
        """The factors of each block turned up and down, first of its scales, then of its minima."""
        for field in (0,) if self._spec.sym else (0, 1):
            nearest_TCN = torch.stack([self._neighbours(own, NEAREST) for own in self._turns(scales[field])])
            tried = [own.expand(len(TURNS) * len(NEAREST), -1) for own in scales]
            tried[field] = nearest_TCN.flatten(0, 1)
            error_TN, level_TN = self._all(*tried).view_as(nearest_TCN).min(1)
            turn_1N = self._of_block(error_TN).argmin(0, keepdim=True)
            found_N = nearest_TCN.gather(1, level_TN.unsqueeze(1))[:, 0].gather(0, turn_1N)[0]
            scales = (found_N, scales[1]) if field == 0 else (scales[0], found_N)
        return scales

    def solved(self, scales: Scales) -> Scales:
        """Weighted least squares of each block's factors for fixed codes and levels, where it lowers the error."""
        scale_N, min_N = (self._stored(own) for own in scales)
        q_NS = round_codes(self._weight_NS, 0.0, scale_N, min_N, self._spec)
        up_NS = scale_N.unsqueeze(-1) * (q_NS - self._spec.midpoint if self._spec.sym else q_NS)
        down_NS = min_N.unsqueeze(-1).expand_as(up_NS)
        uu_N, ud_N, dd_N, uw_N, dw_N = (
            self._of_block((self._moment_NS * one * other).sum(-1))
            for one, other in ((up_NS, up_NS), (up_NS, down_NS), (down_NS, down_NS),
                               (up_NS, self._weight_NS), (down_NS, self._weight_NS))
        )  # fmt: skip
        det_N = uu_N * dd_N - ud_N.square()
        by_N, down_N = (uw_N * dd_N - ud_N * dw_N) / det_N, (uw_N * ud_N - uu_N * dw_N) / det_N
        solvable_N = (det_N > 1e-6 * uu_N * dd_N) & (down_N > 0)
        alone_N = torch.where(uu_N > 0, (uw_N + ud_N) / uu_N, 1.0)  # where the minima stay
        by_N, down_N = torch.where(solvable_N, by_N, alone_N), torch.where(solvable_N, down_N, 1.0)
        scale_CN, min_CN = torch.stack([scale_N, scale_N * by_N]), torch.stack([min_N, min_N * down_N])
        best_1N = self._of_block(self._all(scale_CN, min_CN)).argmin(0, keepdim=True)
        return scale_CN.gather(0, best_1N)[0], min_CN.gather(0, best_1N)[0]

    def levels(self, scales: Scales) -> Scales:
        """The best of each group's integers and their neighbours; those at the last level set the factor of a block."""
        scale_N, min_N = scales
        scale_CN = self._neighbours(scale_N, NEIGHBOURS)
        if self._spec.sym:
            return self._best(scale_CN, min_N.expand_as(scale_CN))
        min_CN = self._neighbours(min_N, NEIGHBOURS)
        return self._best(scale_CN.repeat_interleave(len(NEIGHBOURS), dim=0), min_CN.repeat(len(NEIGHBOURS), 1))

    def _fitted(self, scales: Scales) -> Scales:
        """Weighted least squares for fixed codes; where it has no solution the scales stay."""
        scale_N, min_N = scales
        q_NS = round_codes(self._weight_NS, 0.0, scale_N, min_N, self._spec)
        if self._spec.sym:
            q_NS = q_NS - self._spec.midpoint
        wq_N, qq_N = ((self._moment_NS * q_NS * other).sum(-1) for other in (self._weight_NS, q_NS))
        if self._spec.sym:
            return torch.where(qq_N > 0, wq_N / qq_N, scale_N), min_N
        total_N1 = self._moment_NS.sum(-1, keepdim=True)
        q_N1, w_N1 = ((self._moment_NS * own).sum(-1, keepdim=True) / total_N1 for own in (q_NS, self._weight_NS))
        around_NS = self._moment_NS * (q_NS - q_N1)
        fitted_N = (around_NS * (self._weight_NS - w_N1)).sum(-1) / (around_NS * (q_NS - q_N1)).sum(-1)
        fitted_min_N = fitted_N * q_N1[:, 0] - w_N1[:, 0]
        alone_N = wq_N / qq_N  # the best scale where the minimum is 0
        both_N = fitted_min_N > 0
        fitted_N, fitted_min_N = torch.where(both_N, fitted_N, alone_N), torch.where(both_N, fitted_min_N, 0.0)
        solved_N = fitted_N.isfinite() & (fitted_N > 0)
        return torch.where(solved_N, fitted_N, scale_N), torch.where(solved_N, fitted_min_N, min_N)

    def _best(self, scale_CN: Tensor, min_CN: Tensor) -> Scales:
        """For each group the candidate with the least error."""
        best_1N = self._all(scale_CN, min_CN).argmin(0, keepdim=True)
        return scale_CN.gather(0, best_1N)[0], min_CN.gather(0, best_1N)[0]

    def _all(self, scale_CN: Tensor, min_CN: Tensor) -> Tensor:
        return candidate_errors(self._errors, self._weight_NS, scale_CN, min_CN, self._moment_NS, self._spec)

    def _neighbours(self, value_N: Tensor, steps: tuple[int, ...]) -> Tensor:
        """The stored value of each group, and those some levels below and above."""
        stored, (least, most) = factors(self._blocks(value_N), self._spec), self._spec.level_range
        free_MB = ~self._last(stored.level_OG)
        return torch.stack([
            stored._replace(level_OG=(stored.level_OG + step * free_MB).clamp(least, most)).product().flatten()
            for step in steps
        ])  # fmt: skip

    def _turns(self, value_N: Tensor) -> list[Tensor]:
        """The values with those at the last level, which set their block's factor, turned."""
        value_MB = self._blocks(value_N)
        last_MB = self._last(factors(value_MB, self._spec).level_OG)
        return [torch.where(last_MB, turn * value_MB, value_MB).flatten() for turn in TURNS]

    def _last(self, level_MB: Tensor) -> Tensor:
        least, most = self._spec.level_range
        return level_MB == (least if self._spec.sym else most)

    def _stored(self, value_N: Tensor) -> Tensor:
        return factors(self._blocks(value_N), self._spec).product().flatten()

    def _of_block(self, own_N: Tensor) -> Tensor:
        """Sums over blocks, repeated for each group of one."""
        return self._blocks(own_N).sum(-1, keepdim=True).expand_as(self._blocks(own_N)).flatten(-2)

    def _blocks(self, value_N: Tensor) -> Tensor:
        return rearrange(value_N, "... (m b) -> ... m b", b=self._spec.block_groups)


def _scales_of(part: Prepared, clips: Clips, spec: GgufSpec) -> Scales:
    scale_1N, min_1N = ranges(part, RoundingParams(part.weight_OGS, clips[0], clips[1]), spec)
    return scale_1N[0], min_1N[0]


def _clips_of(part: Prepared, scales: Scales, spec: GgufSpec) -> Clips:
    """The clips whose ``ranges`` are these scales, as far as clips may go."""
    scale_N, min_N = scales
    tiny = torch.finfo(torch.float32).tiny
    lo_N, hi_N = (-part.lo_OG[0]).clamp(min=tiny), part.hi_OG[0].clamp(min=tiny)
    if not spec.sym:
        return (min_N / lo_N).clamp(*CLIP_RANGE), ((scale_N * spec.code_max - min_N) / hi_N).clamp(*CLIP_RANGE)
    end_N = scale_N.abs() * spec.midpoint
    by_lo, by_hi = (end_N / lo_N).clamp(max=CLIP_RANGE[1]), (end_N / hi_N).clamp(max=CLIP_RANGE[1])
    below_lo, below_hi = (0.99 * end_N / hi_N).clamp(max=1), (0.99 * end_N / lo_N).clamp(max=1)
    positive = scale_N > 0
    return torch.where(positive, by_lo, below_hi), torch.where(positive, below_lo, by_hi)
