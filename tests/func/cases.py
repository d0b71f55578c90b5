"""The table of specs that every contract of the grids runs over, and strategies that draw from it."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from autoround import func as F
from autoround.spec import GGUF_TYPES

SPECS = [
    F.QuantSpec(bits=bits, group_size=group_size, sym=sym, scale_dtype=scale_dtype, zero_min=zero_min)
    for bits in (2, 3, 4, 8)
    for group_size in (16, 32, 128, -1)
    for sym in (True, False)
    for scale_dtype, zero_min in (("float16", 0), ("bfloat16", 1), ("float32", 0))
]

GGUF_SPECS = [F.GgufSpec(type=name) for name in GGUF_TYPES]


@st.composite
def weights_OI(draw: st.DrawFn, least: int = 128) -> Tensor:
    """Weights of up to 4 rows and 1 or 2 times ``least`` columns with magnitudes from 1e-6 to 1e3.

    One-sided, constant and all-zero groups are among them.
    """
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, least * groups, generator=generator)
    weight = weight * 10.0 ** draw(st.integers(-6, 3))
    kind = draw(st.sampled_from(["normal", "positive", "negative", "constant", "zero", "outlier"]))
    if kind == "positive":
        return weight.abs()
    if kind == "negative":
        return -weight.abs()
    if kind == "constant":
        return torch.full_like(weight, float(weight[0, 0]))
    if kind == "zero":
        return torch.zeros_like(weight)
    if kind == "outlier":
        weight[:, ::37] *= 50
    return weight


def random_params(prepared: F.Prepared, seed: int) -> F.RoundingParams:
    """Parameters anywhere inside their ranges."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator)

    return F.RoundingParams(uniform(prepared.weight_OGS) - 0.5, uniform(prepared.lo_OG), uniform(prepared.hi_OG))
