"""Products of float32 tensors on the host, by the faster of torch's two libraries where both are as exact.

torch multiplies them with MKL, which leaves half of an AMD processor's vectors unused. Where less precise products are
allowed it asks oneDNN, which uses them all, and which without units for such products computes in float32 all the
same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

# How far both libraries may be from the exact product, relative to each other.
AS_EXACT = 4.0
_CPUINFO = Path("/proc/cpuinfo")


@contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Within it, products of float32 tensors on a CPU are as fast as they can be without loss.

    torch knows one precision for all threads; it is put back at the end, and left alone where it was changed before.

    >>> with float32_products(torch.device("cpu")):
    ...     torch.ones(2, 2) @ torch.ones(2, 2)
    tensor([[2., 2.],
            [2., 2.]])
    >>> torch.get_float32_matmul_precision()
    'highest'
    """
    if device.type != "cpu" or torch.get_float32_matmul_precision() != "highest" or not onednn_suits():
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@cache
def onednn_suits() -> bool:
    """Whether oneDNN's products are faster, and as exact where they need not be."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_f")) and not has.get("amx_bf16") and _vendor() == "AuthenticAMD" and _as_exact()


def _vendor() -> str:
    """Of the processor, as Linux names it; empty where that is not known."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _as_exact() -> bool:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact, errors = left.double() @ right.double(), []
    for precision in ("medium", "highest"):
        torch.set_float32_matmul_precision(precision)
        errors.append(float((left @ right - exact).abs().max()))
    return errors[0] <= AS_EXACT * errors[1]
