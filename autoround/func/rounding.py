"""Weights to codes and back by whatever grid their spec names; training and storage share every operation.

Legend: O output features, I input features, G groups in a row, S columns in a group.

``dequantize(quantize(prepared, params, spec), spec)`` equals ``fake_quantize(prepared, params, spec)`` bit for bit in
eager float32: both are ``values`` of the same integers, scales and shifts.
"""

from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from autoround.errors import ModelError
from autoround.func.grids import gguf as gguf_grid
from autoround.func.grids import int as int_grid
from autoround.func.types import Codes, Prepared, RoundingParams
from autoround.spec import GgufSpec, WeightSpec

OFFSET_RANGE = (-0.5, 0.5)


class Grid(Protocol):
    """The set of values that a weight may take; a module of ``autoround.func.grids`` for each kind of spec.

    Scales (O, G) multiply codes; shifts (O, G) are zero points or minima, as the grid has it.
    """

    @property
    def CLIP_RANGE(self) -> tuple[float, float]: ...

    def ranges(self, prepared: Prepared, params: RoundingParams, spec: Any) -> tuple[Tensor, Tensor]:
        """Scale and shift of every group before what it shares with others rounds them."""
        ...

    def scales(self, prepared: Prepared, params: RoundingParams, spec: Any) -> tuple[Tensor, Tensor]:
        """Scale and shift of every group as they are stored, differentiable in the clips."""
        ...

    def round_codes(
        self, weight_OGS: Tensor, offset_OGS: Tensor | float, scale_OG: Tensor, shift_OG: Tensor, spec: Any
    ) -> Tensor:
        """Codes, integers as floats (O, G, S), straight-through."""
        ...

    def values(self, q_OGS: Tensor, scale_OG: Tensor, shift_OG: Tensor, spec: Any) -> Tensor:
        """What codes stand for, float32 (O, G, S)."""
        ...

    def encode(self, q_OGS: Tensor, prepared: Prepared, params: RoundingParams, spec: Any) -> Any:
        """The stored form: codes with what ``scales`` is made of."""
        ...

    def decode(self, codes: Any, spec: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (O, G, S), scales and shifts of a stored weight, float32."""
        ...


def grid_of(spec: WeightSpec) -> Grid:
    """The grid of a spec.

    >>> grid_of(GgufSpec(type="q4_k")).__name__
    'autoround.func.grids.gguf'
    """
    return gguf_grid if isinstance(spec, GgufSpec) else int_grid


def prepare(weight_OI: Tensor, spec: WeightSpec) -> Prepared:
    """Split a weight into groups and find each group's range.

    Args:
        weight_OI: any float dtype, shape (O, I), finite.
        spec: its groups must divide I.

    Returns:
        float32 ``Prepared``; lo <= 0 <= hi.

    Raises:
        UsageError: the groups do not divide I.
        ModelError: the weight holds NaN or infinity.

    >>> from autoround.spec import QuantSpec
    >>> prepared = prepare(torch.tensor([[1.0, -2.0, 3.0, 4.0]]), QuantSpec(bits=4, group_size=2))
    >>> prepared.lo_OG.tolist(), prepared.hi_OG.tolist()
    ([[-2.0, 0.0]], [[1.0, 4.0]])
    """
    group = spec.group_of(weight_OI.shape[-1])
    weight_OGS = rearrange(weight_OI.float(), "o (g s) -> o g s", s=group)
    lo_OG, hi_OG = weight_OGS.aminmax(dim=-1)
    if not bool(torch.isfinite(hi_OG - lo_OG).all()):
        bad = int((~torch.isfinite(weight_OI)).sum())
        raise ModelError(f"found {bad} NaN or infinite values; needed finite weights; check the checkpoint")
    return Prepared(weight_OGS, lo_OG.clamp(max=0), hi_OG.clamp(min=0))


def nearest(prepared: Prepared) -> RoundingParams:
    """Parameters that round to nearest over each group's full range: offset 0, clips 1.

    >>> from autoround.spec import QuantSpec
    >>> nearest(prepare(torch.ones(1, 4), QuantSpec(group_size=2))).clip_max_OG.tolist()
    [[1.0, 1.0]]
    """
    return RoundingParams(
        torch.zeros_like(prepared.weight_OGS), torch.ones_like(prepared.lo_OG), torch.ones_like(prepared.hi_OG)
    )


def bounds(spec: WeightSpec) -> tuple[RoundingParams, RoundingParams]:
    """Lower and upper bound of every field of ``RoundingParams``, as floats.

    >>> from autoround.spec import QuantSpec
    >>> bounds(QuantSpec())[1]
    RoundingParams(offset_OGS=0.5, clip_min_OG=1.0, clip_max_OG=1.0)
    """
    clip = grid_of(spec).CLIP_RANGE
    lower, upper = zip(OFFSET_RANGE, clip, clip, strict=True)
    return RoundingParams(*lower), RoundingParams(*upper)  # type: ignore[arg-type]


def fake_quantize(prepared: Prepared, params: RoundingParams, spec: WeightSpec) -> Tensor:
    """Round to the grid and back, differentiable in ``params`` with straight-through rounding.

    Args:
        prepared: from ``prepare`` with the same spec.
        params: inside the ranges of ``RoundingParams``.

    Returns:
        float32 (O, I).

    >>> from autoround.spec import QuantSpec
    >>> spec = QuantSpec(bits=2, group_size=4)
    >>> prepared = prepare(torch.tensor([[-2.0, -0.4, 0.4, 1.0]]), spec)
    >>> fake_quantize(prepared, nearest(prepared), spec).tolist()
    [[-2.0, 0.0, 0.0, 1.0]]
    """
    grid = grid_of(spec)
    scale_OG, shift_OG = grid.scales(prepared, params, spec)
    q_OGS = grid.round_codes(prepared.weight_OGS, params.offset_OGS, scale_OG, shift_OG, spec)
    return rearrange(grid.values(q_OGS, scale_OG, shift_OG, spec), "o g s -> o (g s)")


def quantize(prepared: Prepared, params: RoundingParams, spec: WeightSpec) -> Codes:
    """The codes that ``fake_quantize`` rounds to, on the device of the weight.

    Raises:
        ModelError: a scale is beyond the range of its dtype.

    >>> from autoround.spec import QuantSpec
    >>> spec = QuantSpec(bits=2, group_size=4)
    >>> prepared = prepare(torch.tensor([[-2.0, -0.4, 0.4, 1.0]]), spec)
    >>> quantize(prepared, nearest(prepared), spec).q_OI.tolist()
    [[0, 2, 2, 3]]
    """
    grid = grid_of(spec)
    with torch.no_grad():
        scale_OG, shift_OG = grid.scales(prepared, params, spec)
        q_OGS = grid.round_codes(prepared.weight_OGS, params.offset_OGS, scale_OG, shift_OG, spec)
        codes: Codes = grid.encode(q_OGS, prepared, params, spec)
    return codes


def dequantize(codes: Codes, spec: WeightSpec) -> Tensor:
    """The weight that codes stand for, float32 (O, I).

    >>> from autoround.func.types import IntCodes
    >>> from autoround.spec import QuantSpec
    >>> codes = IntCodes(torch.tensor([[0, 3]]), torch.tensor([[0.5]]), torch.tensor([[1]]))
    >>> dequantize(codes, QuantSpec(bits=2, group_size=2, sym=False)).tolist()
    [[-0.5, 1.0]]
    """
    grid = grid_of(spec)
    return rearrange(grid.values(*grid.decode(codes, spec), spec), "o g s -> o (g s)")
