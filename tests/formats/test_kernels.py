"""The kernels that torch ships, and the order of the codes they hold."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autoround.formats import kernels
from autoround.formats.kernels import Kernel, find_kernel

CPU = torch.device("cpu")
DEVICES = [
    CPU,
    pytest.param(
        torch.device("cuda", 0), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_every_code_is_found_again(device: torch.device) -> None:
    kernel = find_kernel(device)
    if kernel is None and platform.machine() != "x86_64":
        pytest.skip("no kernel for this processor")
    assert kernel is not None
    codes_OI = torch.randint(0, 16, (192, 384), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    tiles = kernel.pack(codes_OI.t().to(device))
    assert torch.equal(tiles, kernel.convert(codes_OI.to(device)))
    assert tiles.nbytes == codes_OI.numel() // 2
    assert torch.equal(kernel.unpack(tiles, 384).int().cpu(), codes_OI.t())
    half = tiles[len(tiles) // 3 :]
    assert torch.equal(kernel.unpack(half, 384).int().cpu(), codes_OI[64:].t())


def test_any_order_in_a_tile_is_found() -> None:
    """Tiles of the size that CUDA's have, in an order of our own."""
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(0))

    def convert(codes_OI: Tensor) -> Tensor:
        tiles = codes_OI.view(len(codes_OI) // 8, 8, -1, 128).transpose(1, 2).flatten(2)[..., order].to(torch.uint8)
        return tiles[..., ::2].bitwise_or(tiles[..., 1::2] << 4).view(torch.int32)

    kernel = kernels._with_places(Kernel("cpu", 8, 128, 16, convert, kernels._multiply_cuda), CPU)
    codes_OI = torch.randint(0, 16, (24, 384), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    tiles = kernel.pack(codes_OI.t())
    assert torch.equal(kernel.unpack(tiles[1:], 384).int(), codes_OI[8:].t())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
@pytest.mark.parametrize(("capability", "rows"), [("default", None), ("avx2", 32)])
def test_smaller_instruction_sets(capability: str, rows: int | None) -> None:
    """A processor with AVX512 also runs the others' code. What is made for none of them is slow, and not used."""
    script = (
        "import torch; from autoround.formats.kernels import find_kernel;"
        f"assert torch.backends.cpu.get_cpu_capability() == {capability.upper()!r};"
        "kernel = find_kernel(torch.device('cpu')); print(kernel and kernel.rows)"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(rows)]


def _raises(codes_OI: Tensor) -> Tensor:
    raise RuntimeError("not on this processor")


def _without_operator(codes_OI: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten._no_such_operator(codes_OI)
    return result


@pytest.mark.parametrize("convert", [_raises, _without_operator])
def test_a_kernel_that_is_missing_is_not_used(
    convert: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_KERNELS", [kernel._replace(convert=convert) for kernel in kernels._KERNELS])
    assert find_kernel.__wrapped__(CPU) is None


def _with_another_zero(kernel: Kernel) -> Kernel:
    """As if a weight were ``q * scale + zero``."""

    def multiply(x_MI: Tensor, tiles: Tensor, group: int, table_GO2: Tensor) -> Tensor:
        table_GO2 = table_GO2.clone()
        table_GO2[..., 1] += 8 * table_GO2[..., 0]
        return kernel.multiply(x_MI, tiles, group, table_GO2)

    return kernel._replace(multiply=multiply)


def _with_another_order(kernel: Kernel) -> Kernel:
    """As if columns were stored backwards, which a single tile does not show."""
    return kernel._replace(convert=lambda codes_OI: kernel.convert(codes_OI.flip(1)))


@pytest.mark.parametrize("change", [_with_another_zero, _with_another_order])
def test_a_kernel_that_computes_something_else_is_not_used(
    change: Callable[[Kernel], Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_KERNELS", [change(kernel) for kernel in kernels._KERNELS])
    assert find_kernel.__wrapped__(CPU) is None
