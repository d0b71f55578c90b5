"""GGUF blocks: integer scales and minima of groups, multiplied by float16 factors of their block.

Legend: O output features, I input features, G groups in a row, S columns in a group, K blocks in a row, B groups in a
block.

Operations follow the order in which ``gguf.dequantize`` evaluates a block: the group's scale first, then the code.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from autoround.errors import ModelError
from autoround.func.grids.straight import round_straight, round_to_dtype
from autoround.func.types import AsymBlockCodes, Prepared, RoundingParams, SymBlockCodes
from autoround.spec import GgufSpec

# Fitted ranges may be wider than the weights themselves: that of the largest group of a block sets the block's factor.
CLIP_RANGE = (0.0, 4.0)


class Factors(NamedTuple):
    """A float16 factor of each block and the integers it multiplies, both as float32.

    Attributes:
        factor_OK: of either sign where the integers are signed.
        level_OG: integers.
    """

    factor_OK: Tensor
    level_OG: Tensor

    def product(self) -> Tensor:
        """``factor * level``, (O, G)."""
        groups = self.level_OG.shape[-1] // self.factor_OK.shape[-1]
        return rearrange(self.factor_OK.unsqueeze(-1) * rearrange(self.level_OG, "o (k b) -> o k b", b=groups),
                         "o k b -> o (k b)")  # fmt: skip


def ranges(prepared: Prepared, params: RoundingParams, spec: GgufSpec) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each group before their block rounds them, float32 (O, G) both.

    Symmetric: the larger of the two clipped ends, with its sign, lands on code 0, as on the integer grid; minima are 0.
    Asymmetric: ``scale = (hi - lo) / (2**bits - 1)``, ``min = -lo``.

    >>> from autoround.func.rounding import nearest, prepare
    >>> prepared = prepare(torch.tensor([[-1.0] + [2.0] * 31]), GgufSpec(type="q4_1"))
    >>> [each.item() for each in ranges(prepared, nearest(prepared), GgufSpec(type="q4_1"))]
    [0.20000000298023224, 1.0]
    """
    lo_OG = prepared.lo_OG * params.clip_min_OG
    hi_OG = prepared.hi_OG * params.clip_max_OG
    if spec.sym:
        return torch.where(-lo_OG > hi_OG, -lo_OG, -hi_OG) / spec.midpoint, torch.zeros_like(lo_OG)
    return (hi_OG - lo_OG) / spec.code_max, -lo_OG


def factors(value_OG: Tensor, spec: GgufSpec) -> Factors:
    """Round the groups' scales or minima as their blocks store them: the largest of a block takes the last level.

    >>> value_OG = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.63]])
    >>> factors(value_OG, GgufSpec(type="q4_k")).level_OG.tolist()
    [[0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 63.0]]
    """
    layout = spec.layout
    if not layout.scale_bits:
        return Factors(round_to_dtype(value_OG, "float16"), torch.ones_like(value_OG))
    value_OKB = rearrange(value_OG, "o (k b) -> o k b", b=layout.groups)
    least, most = spec.level_range
    if spec.sym:
        largest_OK = value_OKB.gather(-1, value_OKB.abs().argmax(-1, keepdim=True)).squeeze(-1)
        factor_OK = round_to_dtype(largest_OK / least, "float16")
    else:
        factor_OK = round_to_dtype(value_OKB.amax(-1) / most, "float16")
    level_OKB = (value_OKB / _divisor(factor_OK).unsqueeze(-1)).round().clamp(least, most)
    return Factors(factor_OK, rearrange(level_OKB, "o k b -> o (k b)"))


def scales(prepared: Prepared, params: RoundingParams, spec: GgufSpec) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each group as its block stores them; gradients are those of ``ranges``.

    Returns:
        (scale_OG, min_OG), float32 both; minima are 0 on symmetric grids.

    >>> from autoround.func.rounding import nearest, prepare
    >>> prepared = prepare(torch.linspace(-1, 1, 256)[None], GgufSpec(type="q4_k"))
    >>> scale_OG, min_OG = scales(prepared, nearest(prepared), GgufSpec(type="q4_k"))
    >>> [round(value, 4) for value in min_OG[0].tolist()]
    [0.9998, 0.7458, 0.4919, 0.2539, 0.0, 0.0, 0.0, 0.0]
    """
    scale_OG, min_OG = ranges(prepared, params, spec)
    return _straight(scale_OG, spec), min_OG if spec.sym else _straight(min_OG, spec)


def round_codes(
    weight_OGS: Tensor, offset_OGS: Tensor | float, scale_OG: Tensor, min_OG: Tensor, spec: GgufSpec
) -> Tensor:
    """``clamp(round((w + min) / scale + offset), 0, 2**bits - 1)``, integers as floats (O, G, S), straight-through.

    Symmetric codes are shifted by their midpoint in place of the minimum. A scale of 0 makes some code of no effect.

    >>> scale_OG, min_OG = torch.tensor([[0.5]]), torch.tensor([[1.0]])
    >>> round_codes(torch.tensor([[[-9.0, 0.2, 0.3]]]), 0.0, scale_OG, min_OG, GgufSpec(type="q2_k")).tolist()
    [[[0.0, 2.0, 3.0]]]
    """
    divisor_OG1 = _divisor(scale_OG).unsqueeze(-1)
    if spec.sym:
        q_OGS = round_straight(weight_OGS / divisor_OG1 + offset_OGS) + spec.midpoint
    else:
        q_OGS = round_straight((weight_OGS + min_OG.unsqueeze(-1)) / divisor_OG1 + offset_OGS)
    return q_OGS.clamp(0, spec.code_max)


def values(q_OGS: Tensor, scale_OG: Tensor, min_OG: Tensor, spec: GgufSpec) -> Tensor:
    """``scale * (q - midpoint)`` or ``scale * q - min``.

    >>> q_OGS, scale_OG, min_OG = torch.tensor([[[3.0]]]), torch.tensor([[0.5]]), torch.tensor([[1.0]])
    >>> values(q_OGS, scale_OG, min_OG, GgufSpec(type="q2_k")).item()
    0.5
    """
    if spec.sym:
        return scale_OG.unsqueeze(-1) * (q_OGS - spec.midpoint)
    return scale_OG.unsqueeze(-1) * q_OGS - min_OG.unsqueeze(-1)


def encode(q_OGS: Tensor, prepared: Prepared, params: RoundingParams, spec: GgufSpec) -> SymBlockCodes | AsymBlockCodes:
    """Codes with the integers and float16 factors that ``scales`` is made of.

    Raises:
        ModelError: a factor is beyond float16.

    >>> from autoround.func.rounding import nearest, prepare, quantize
    >>> prepared = prepare(torch.linspace(-1, 1, 256)[None], GgufSpec(type="q4_k"))
    >>> quantize(prepared, nearest(prepared), GgufSpec(type="q4_k")).min_OG.tolist()
    [[63, 47, 31, 16, 0, 0, 0, 0]]
    """
    scale_OG, min_OG = ranges(prepared, params, spec)
    q_OI = rearrange(q_OGS, "o g s -> o (g s)").to(torch.uint8)
    scale = factors(scale_OG, spec)
    if spec.sym:
        return SymBlockCodes(q_OI, scale.level_OG.to(torch.int8), _stored(scale.factor_OK, spec))
    low = factors(min_OG, spec)
    return AsymBlockCodes(
        q_OI,
        scale.level_OG.to(torch.uint8),
        low.level_OG.to(torch.uint8),
        _stored(scale.factor_OK, spec),
        _stored(low.factor_OK, spec),
    )


def decode(codes: SymBlockCodes | AsymBlockCodes, spec: GgufSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (O, G, S), scales and minima (O, G), float32.

    >>> q_OI, level_OG = torch.zeros(1, 32), torch.ones(1, 1)
    >>> codes = SymBlockCodes(q_OI, level_OG, torch.tensor([[0.5]]))
    >>> [tuple(part.shape) for part in decode(codes, GgufSpec(type="q4_0"))]
    [(1, 1, 32), (1, 1), (1, 1)]
    """
    q_OGS = rearrange(codes.q_OI.float(), "o (g s) -> o g s", s=spec.group_size)
    scale_OG = Factors(codes.d_OK.float(), codes.scale_OG.float()).product()
    if isinstance(codes, SymBlockCodes):
        return q_OGS, scale_OG, torch.zeros_like(scale_OG)
    return q_OGS, scale_OG, Factors(codes.dmin_OK.float(), codes.min_OG.float()).product()


def _straight(value_OG: Tensor, spec: GgufSpec) -> Tensor:
    """As stored; the gradient is 1."""
    return factors(value_OG.detach(), spec).product() + (value_OG - value_OG.detach())


def _divisor(x: Tensor) -> Tensor:
    """1 in place of 0."""
    return torch.where(x == 0, 1.0, x)


def _stored(factor_OK: Tensor, spec: GgufSpec) -> Tensor:
    stored_OK = factor_OK.to(torch.float16)
    if not bool(torch.isfinite(stored_OK).all()):
        raise ModelError(
            f"found a scale of {float(factor_OK.abs().max()):.3g}, beyond float16; needed at most 65504 in {spec}"
        )
    return stored_OK
