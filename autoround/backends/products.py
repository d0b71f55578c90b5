"""Products of float32 tensors on the host, by the faster of torch's two libraries where both are as exact.

torch multiplies them with MKL, which makes half of the rate that AMD's processors with AVX-512 allow. Where less
precise products are allowed it asks oneDNN, which makes all of it, and which computes in float32 all the same where
there are no units for such products.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

# How many times MKL's largest error oneDNN's may be.
AS_EXACT = 4.0
_CPUINFO = Path("/proc/cpuinfo")
# How many are inside, of all threads.
_LOCK, _INSIDE = threading.Lock(), [0]


@contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Within it, products of float32 tensors on a CPU are as fast as they can be without loss.

    torch knows one precision for all threads and devices, so that CUDA multiplies in TF32 meanwhile, if this process
    uses it beside. It is put back when the last of several that overlap is left, and left alone where it was another.

    >>> with float32_products(torch.device("cpu")):
    ...     torch.ones(2, 2) @ torch.ones(2, 2)
    tensor([[2., 2.],
            [2., 2.]])
    >>> torch.get_float32_matmul_precision()
    'highest'
    """
    with _LOCK:
        suits = device.type == "cpu" and (_INSIDE[0] > 0 or torch.get_float32_matmul_precision() == "highest")
        if suits := suits and onednn_suits():
            _INSIDE[0] += 1
            torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE[0] -= suits
            if suits and not _INSIDE[0]:
                torch.set_float32_matmul_precision("highest")


@cache
def onednn_suits() -> bool:
    """Whether oneDNN's products are faster, by the kind of processor, and as exact where they need not be."""
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
    exact, errors, before = left.double() @ right.double(), [], torch.get_float32_matmul_precision()
    try:
        for precision in ("medium", "highest"):
            torch.set_float32_matmul_precision(precision)
            errors.append(float((left @ right - exact).abs().max()))
    finally:
        torch.set_float32_matmul_precision(before)
    return errors[0] <= AS_EXACT * errors[1]
