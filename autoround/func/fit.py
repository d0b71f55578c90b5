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

    First each group's scale and minimum are fitted to its codes by weighted least squares, over and over; then, where
    blocks store them as integers, each group's integers are searched by the error that remains.

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

    def levels(self, scales: Scales) -> Scales:
        """The best of each group's integers and their neighbours; those at the last level set the factor of a block."""
        scale_N, min_N = scales
        scale_CN = self._neighbours(scale_N)
        if self._spec.sym:
            return self._best(scale_CN, min_N.expand_as(scale_CN))
        min_CN = self._neighbours(min_N)
        return self._best(scale_CN.repeat_interleave(len(NEIGHBOURS), dim=0), min_CN.repeat(len(NEIGHBOURS), 1))

    def _fitted(self, scales: Scales) -> Scales:
        """Weighted least squares for fixed codes; where it has no solution the scales stay."""
        scale_N, min_N = scales
        q_NS = round_codes(self._weight_NS, 0.0, scale_N, min_N, self._spec)
        if self._spec.sym:
            q_NS = q_NS - self._spec.midpoint
        weighted_NS = self._moment_NS * q_NS
        wq_N, qq_N = (weighted_NS * self._weight_NS).sum(-1), (weighted_NS * q_NS).sum(-1)
        if self._spec.sym:
            return torch.where(qq_N > 0, wq_N / qq_N, scale_N), min_N
        total_N, q_N = self._moment_NS.sum(-1), weighted_NS.sum(-1)
        w_N = (self._moment_NS * self._weight_NS).sum(-1)
        spread_N = total_N * qq_N - q_N.square()
        fitted_N = (total_N * wq_N - q_N * w_N) / spread_N
        fitted_min_N = (q_N * wq_N - qq_N * w_N) / spread_N
        alone_N = wq_N / qq_N  # the best scale where the minimum is 0
        fitted_N = torch.where(fitted_min_N > 0, fitted_N, alone_N)
        solved = (spread_N > 1e-6 * total_N * qq_N) & (fitted_N > 0)
        return torch.where(solved, fitted_N, scale_N), torch.where(solved, fitted_min_N.clamp(min=0), min_N)

    def _best(self, scale_CN: Tensor, min_CN: Tensor) -> Scales:
        """For each group the candidate with the least error."""
        best_1N = self._all(scale_CN, min_CN).argmin(0, keepdim=True)
        return scale_CN.gather(0, best_1N)[0], min_CN.gather(0, best_1N)[0]

    def _all(self, scale_CN: Tensor, min_CN: Tensor) -> Tensor:
        return candidate_errors(self._errors, self._weight_NS, scale_CN, min_CN, self._moment_NS, self._spec)

    def _neighbours(self, value_N: Tensor) -> Tensor:
        """The stored value of each group, and those a level below and above."""
        stored = factors(self._blocks(value_N), self._spec)
        least, most = self._spec.level_range
        free_MB = stored.level_OG != (least if self._spec.sym else most)
        return torch.stack([
            stored._replace(level_OG=(stored.level_OG + step * free_MB).clamp(least, most)).product().flatten()
            for step in NEIGHBOURS
        ])  # fmt: skip

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
