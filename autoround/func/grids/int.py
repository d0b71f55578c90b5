"""Integer grids: unsigned codes with a scale and a zero point per group (SignRound, arXiv 2309.05516, section 3).

Legend: O output features, I input features, G groups in a row, S columns in a group.
"""

import torch
from einops import rearrange
from torch import Tensor

from autoround.errors import ModelError
from autoround.func.grids.straight import cast_straight, round_straight
from autoround.func.types import IntCodes, Prepared, RoundingParams
from autoround.spec import QuantSpec

CLIP_RANGE = (0.0, 1.0)


def scales(prepared: Prepared, params: RoundingParams, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group from its clipped range.

    Asymmetric: ``scale = (hi - lo) / (2**bits - 1)`` and ``zero = round(-lo / scale)`` with clipped ``lo`` and ``hi``.
    Symmetric, full range: the larger of the two clipped ends, with its sign, lands on code 0 (``-2**(bits-1)``
    relative to the zero point), so the scale is negative where the positive end is the larger one.
    The scale is rounded to its dtype first, then kept at least ``spec.scale_floor`` away from zero.

    Returns:
        (scale_OG, zero_OG), float32 both.

    >>> from autoround.func.rounding import nearest, prepare
    >>> asym, sym = (QuantSpec(bits=2, group_size=2, sym=each) for each in (False, True))
    >>> prepared = prepare(torch.tensor([[-1.0, 2.0]]), asym)
    >>> [each.item() for each in scales(prepared, nearest(prepared), asym)]
    [1.0, 1.0]
    >>> [each.item() for each in scales(prepared, nearest(prepared), sym)]
    [-1.0, 2.0]
    """
    lo_OG = prepared.lo_OG * params.clip_min_OG
    hi_OG = prepared.hi_OG * params.clip_max_OG
    floor = spec.scale_floor
    if spec.sym:
        scale_OG = cast_straight(torch.where(-lo_OG > hi_OG, -lo_OG, -hi_OG) / spec.midpoint, spec.scale_dtype)
        scale_OG = torch.where(scale_OG < 0, scale_OG.clamp(max=-floor), scale_OG.clamp(min=floor))
        return scale_OG, torch.full_like(scale_OG, spec.midpoint)
    scale_OG = cast_straight((hi_OG - lo_OG) / spec.code_max, spec.scale_dtype).clamp(min=floor)
    zero_OG = round_straight(-lo_OG / scale_OG).clamp(spec.zero_min, spec.code_max)
    return scale_OG, zero_OG


# Before and after rounding as stored: nothing is shared between groups here.
ranges = scales


def round_codes(
    weight_OGS: Tensor, offset_OGS: Tensor | float, scale_OG: Tensor, zero_OG: Tensor, spec: QuantSpec
) -> Tensor:
    """``clamp(round(w / scale + offset) + zero, 0, 2**bits - 1)``, integers as floats (O, G, S), straight-through.

    >>> scale_OG, zero_OG = torch.tensor([[0.5]]), torch.tensor([[2.0]])
    >>> round_codes(torch.tensor([[[-9.0, 0.2, 0.3]]]), 0.0, scale_OG, zero_OG, QuantSpec(bits=2)).tolist()
    [[[0.0, 2.0, 3.0]]]
    """
    steps_OGS = weight_OGS / scale_OG.unsqueeze(-1) + offset_OGS
    return (round_straight(steps_OGS) + zero_OG.unsqueeze(-1)).clamp(0, spec.code_max)


def values(q_OGS: Tensor, scale_OG: Tensor, zero_OG: Tensor, spec: QuantSpec) -> Tensor:
    """``scale * (q - zero)``.

    >>> values(torch.tensor([[[3.0]]]), torch.tensor([[0.5]]), torch.tensor([[2.0]]), QuantSpec(bits=2)).item()
    0.5
    """
    del spec  # symmetric codes have a zero point as well
    return scale_OG.unsqueeze(-1) * (q_OGS - zero_OG.unsqueeze(-1))


def encode(q_OGS: Tensor, prepared: Prepared, params: RoundingParams, spec: QuantSpec) -> IntCodes:
    """Codes with scales in the spec's dtype.

    Raises:
        ModelError: a scale is not finite in that dtype.

    >>> from autoround.func.rounding import nearest, prepare
    >>> spec = QuantSpec(bits=2, group_size=2)
    >>> prepared = prepare(torch.tensor([[-2.0, 1.0]]), spec)
    >>> encode(torch.tensor([[[0.0, 3.0]]]), prepared, nearest(prepared), spec).scale_OG.item()
    1.0
    """
    scale_OG, zero_OG = scales(prepared, params, spec)
    stored_OG = scale_OG.to(getattr(torch, spec.scale_dtype))
    if not bool(torch.isfinite(stored_OG).all()):
        raise ModelError(
            f"found a scale of {float(scale_OG.abs().max()):.3g}, beyond {spec.scale_dtype}; use --scale_dtype float32"
        )
    return IntCodes(rearrange(q_OGS, "o g s -> o (g s)").to(torch.uint8), stored_OG, zero_OG.to(torch.uint8))


def decode(codes: IntCodes, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (O, G, S), scales and zero points (O, G), float32.

    >>> codes = IntCodes(torch.tensor([[0, 3]]), torch.tensor([[0.5]]), torch.tensor([[1]]))
    >>> [tuple(part.shape) for part in decode(codes, QuantSpec(bits=2, group_size=2))]
    [(1, 1, 2), (1, 1), (1, 1)]
    """
    q_OGS = rearrange(codes.q_OI.float(), "o (g s) -> o g s", s=spec.group_of(codes.q_OI.shape[-1]))
    return q_OGS, codes.scale_OG.float(), codes.zero_OG.float()
