"""Integer grids: unsigned codes with a scale and a zero point per group (SignRound, arXiv 2309.05516, section 3).

Legend: O output features, I input features, G groups in a row, S columns in a group.

Training and storage share ``scale_and_zero`` and ``round_codes``, which is why
``dequantize(quantize(...))`` equals ``fake_quantize(...)`` bit for bit in eager float32.
"""

import torch
from einops import rearrange
from torch import Tensor

from autoround.errors import ModelError
from autoround.func.types import IntCodes, Prepared, RoundingParams
from autoround.spec import QuantSpec

OFFSET_RANGE = (-0.5, 0.5)
CLIP_RANGE = (0.0, 1.0)


def prepare(weight_OI: Tensor, spec: QuantSpec) -> Prepared:
    """Split a weight into groups and find each group's range.

    Args:
        weight_OI: any float dtype, shape (O, I), finite.
        spec: its group_size must divide I (or be -1).

    Returns:
        float32 ``Prepared`` with G = I / group_size; lo <= 0 <= hi.

    Raises:
        UsageError: group_size does not divide I.
        ModelError: the weight holds NaN or infinity.

    >>> prepared = prepare(torch.tensor([[1.0, -2.0, 3.0, 4.0]]), QuantSpec(bits=4, group_size=2))
    >>> prepared.lo_OG.tolist(), prepared.hi_OG.tolist()
    ([[-2.0, 0.0]], [[1.0, 4.0]])
    """
    group = spec.group_of(weight_OI.shape[-1])
    weight_OGS = rearrange(weight_OI.float(), "o (g s) -> o g s", s=group)
    lo_OG, hi_OG = weight_OGS.aminmax(dim=-1)
    if not bool(torch.isfinite(hi_OG - lo_OG).all()):
        bad = int((~torch.isfinite(weight_OI)).sum())
        raise ModelError(
            f"found {bad} NaN or infinite values in a weight of shape {tuple(weight_OI.shape)}; needed none"
        )
    return Prepared(weight_OGS, lo_OG.clamp(max=0), hi_OG.clamp(min=0))


def init(prepared: Prepared) -> RoundingParams:
    """Parameters that round to nearest over each group's full range: offset 0, clips 1.

    >>> init(prepare(torch.ones(1, 4), QuantSpec(group_size=2))).clip_max_OG.tolist()
    [[1.0, 1.0]]
    """
    return RoundingParams(
        torch.zeros_like(prepared.weight_OGS), torch.ones_like(prepared.lo_OG), torch.ones_like(prepared.hi_OG)
    )


def bounds() -> tuple[RoundingParams, RoundingParams]:
    """Lower and upper bound of every field of ``RoundingParams``, as floats.

    >>> bounds()[1]
    RoundingParams(offset_OGS=0.5, clip_min_OG=1.0, clip_max_OG=1.0)
    """
    lower, upper = zip(OFFSET_RANGE, CLIP_RANGE, CLIP_RANGE, strict=True)
    return RoundingParams(*lower), RoundingParams(*upper)  # type: ignore[arg-type]


def fake_quantize(prepared: Prepared, params: RoundingParams, spec: QuantSpec) -> Tensor:
    """Round to the grid and back, differentiable in ``params`` with straight-through rounding.

    ``scale * (clamp(round(w / scale + offset) + zero, 0, 2**bits - 1) - zero)``; see ``scale_and_zero`` for the rest.

    Args:
        prepared: from ``prepare`` with the same spec.
        params: inside the ranges of ``RoundingParams``.

    Returns:
        float32 (O, I).

    >>> spec = QuantSpec(bits=2, group_size=4)
    >>> prepared = prepare(torch.tensor([[-2.0, -0.4, 0.4, 1.0]]), spec)
    >>> fake_quantize(prepared, init(prepared), spec).tolist()
    [[-2.0, 0.0, 0.0, 1.0]]
    """
    scale_OG, zero_OG = scale_and_zero(prepared, params, spec)
    q_OGS = round_codes(prepared.weight_OGS, params.offset_OGS, scale_OG, zero_OG, spec)
    return rearrange(scale_OG.unsqueeze(-1) * (q_OGS - zero_OG.unsqueeze(-1)), "o g s -> o (g s)")


def quantize(prepared: Prepared, params: RoundingParams, spec: QuantSpec) -> IntCodes:
    """The codes that ``fake_quantize`` rounds to.

    Returns:
        ``IntCodes`` on the device of the weight.

    Raises:
        ModelError: a scale is not finite in the spec's scale dtype.

    >>> spec = QuantSpec(bits=2, group_size=4)
    >>> prepared = prepare(torch.tensor([[-2.0, -0.4, 0.4, 1.0]]), spec)
    >>> quantize(prepared, init(prepared), spec).q_OI.tolist()
    [[0, 2, 2, 3]]
    """
    with torch.no_grad():
        scale_OG, zero_OG = scale_and_zero(prepared, params, spec)
        q_OGS = round_codes(prepared.weight_OGS, params.offset_OGS, scale_OG, zero_OG, spec)
    stored_OG = scale_OG.to(getattr(torch, spec.scale_dtype))
    if not bool(torch.isfinite(stored_OG).all()):
        raise ModelError(
            f"found a scale of {float(scale_OG.abs().max()):.3g}, beyond {spec.scale_dtype}; use --scale_dtype float32"
        )
    return IntCodes(
        rearrange(q_OGS, "o g s -> o (g s)").to(torch.uint8),
        stored_OG,
        zero_OG.to(torch.uint8),
    )


def dequantize(codes: IntCodes, spec: QuantSpec) -> Tensor:
    """The weight that codes stand for, ``scale * (q - zero)``.

    Returns:
        float32 (O, I).

    >>> codes = IntCodes(torch.tensor([[0, 3]]), torch.tensor([[0.5]]), torch.tensor([[1]]))
    >>> dequantize(codes, QuantSpec(bits=2, group_size=2, sym=False)).tolist()
    [[-0.5, 1.0]]
    """
    q_OGS = rearrange(codes.q_OI.float(), "o (g s) -> o g s", s=spec.group_of(codes.q_OI.shape[-1]))
    return rearrange(codes.scale_OG.float().unsqueeze(-1) * (q_OGS - codes.zero_OG.float().unsqueeze(-1)),
                     "o g s -> o (g s)")  # fmt: skip


def scale_and_zero(prepared: Prepared, params: RoundingParams, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group from its clipped range.

    Asymmetric: ``scale = (hi - lo) / (2**bits - 1)`` and ``zero = round(-lo / scale)`` with clipped ``lo`` and ``hi``.
    Symmetric, full range: the larger of the two clipped ends, with its sign, lands on code 0 (``-2**(bits-1)``
    relative to the zero point), so the scale is negative where the positive end is the larger one.
    The scale is rounded to its dtype first, then kept at least ``spec.scale_floor`` away from zero.

    Returns:
        (scale_OG, zero_OG), float32 both.

    >>> prepared = prepare(torch.tensor([[-1.0, 2.0]]), QuantSpec(bits=2, group_size=2, sym=False))
    >>> [each.item() for each in scale_and_zero(prepared, init(prepared), QuantSpec(bits=2, group_size=2, sym=False))]
    [1.0, 1.0]
    >>> [each.item() for each in scale_and_zero(prepared, init(prepared), QuantSpec(bits=2, group_size=2, sym=True))]
    [-1.0, 2.0]
    """
    lo_OG = prepared.lo_OG * params.clip_min_OG
    hi_OG = prepared.hi_OG * params.clip_max_OG
    floor = spec.scale_floor
    if spec.sym:
        scale_OG = _cast_ste(torch.where(-lo_OG > hi_OG, -lo_OG, -hi_OG) / spec.midpoint, spec.scale_dtype)
        scale_OG = torch.where(scale_OG < 0, scale_OG.clamp(max=-floor), scale_OG.clamp(min=floor))
        return scale_OG, torch.full_like(scale_OG, spec.midpoint)
    scale_OG = _cast_ste((hi_OG - lo_OG) / spec.code_max, spec.scale_dtype).clamp(min=floor)
    zero_OG = _round_ste(-lo_OG / scale_OG).clamp(spec.zero_min, spec.code_max)
    return scale_OG, zero_OG


def round_codes(
    weight_OGS: Tensor, offset_OGS: Tensor | float, scale_OG: Tensor, zero_OG: Tensor, spec: QuantSpec
) -> Tensor:
    """``clamp(round(w / scale + offset) + zero, 0, 2**bits - 1)``, integers as floats (O, G, S), straight-through.

    >>> scale_OG, zero_OG = torch.tensor([[0.5]]), torch.tensor([[2.0]])
    >>> round_codes(torch.tensor([[[-9.0, 0.2, 0.3]]]), 0.0, scale_OG, zero_OG, QuantSpec(bits=2)).tolist()
    [[[0.0, 2.0, 3.0]]]
    """
    steps_OGS = weight_OGS / scale_OG.unsqueeze(-1) + offset_OGS
    return (_round_ste(steps_OGS) + zero_OG.unsqueeze(-1)).clamp(0, spec.code_max)


def _round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient is 1. ``x - x.detach()`` is exactly 0, so the value is exact."""
    return x.detach().round() + (x - x.detach())


def _cast_ste(x: Tensor, dtype: str) -> Tensor:
    """Round to a dtype's values; the gradient stays float32, where a cast would make small ones underflow."""
    return round_to_dtype(x.detach(), dtype) + (x - x.detach())


def round_to_dtype(x: Tensor, dtype: str) -> Tensor:
    """Round float32 to the nearest value of a narrower dtype, ties to even, without leaving float32.

    Compilers drop casts down and up again; integer arithmetic on the bits survives them. Values beyond the
    dtype's range are not turned into infinities here.

    >>> round_to_dtype(torch.tensor([1 / 3, 3e-8]), "float16").tolist() == torch.tensor([1 / 3, 3e-8]).half().tolist()
    True
    """
    if dtype == "float32":
        return x
    dropped = 13 if dtype == "float16" else 16
    bits = x.view(torch.int32)
    bits = bits + (2 ** (dropped - 1) - 1) + ((bits >> dropped) & 1)
    rounded: Tensor = (bits & -(2**dropped)).view(torch.float32)
    if dtype == "float16":  # below 2**-14 its values are 2**-24 apart, as float32's are around 0.75
        rounded = torch.where(x.abs() < 2.0**-14, (x + 0.75) - 0.75, rounded)
    return rounded
