"""Rounding whose gradient is that of the identity."""

import torch
from torch import Tensor


def round_straight(x: Tensor) -> Tensor:
    """Round half to even; the gradient is 1. ``x - x.detach()`` is exactly 0, so the value is exact.

    >>> round_straight(torch.tensor([0.5, 1.5])).tolist()
    [0.0, 2.0]
    """
    return x.detach().round() + (x - x.detach())


def cast_straight(x: Tensor, dtype: str) -> Tensor:
    """Round to a dtype's values; the gradient stays float32, where a cast would make small ones underflow.

    >>> cast_straight(torch.tensor([1 / 3]), "float16").item()
    0.333251953125
    """
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
