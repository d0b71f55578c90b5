"""Products of float32 tensors by the faster library: as exact, and only where work is done."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autoround.backends import products
from autoround.backends.products import AS_EXACT, float32_products, onednn_suits
from autoround.engine import quantize
from tests.engine.small import make, recipe, tune

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def highest() -> Iterator[None]:
    """What is kept of the processor is forgotten, and torch's precision stays what it was."""
    onednn_suits.cache_clear()
    yield
    onednn_suits.cache_clear()
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("shape", [(2048, 576, 1536), (512, 1536, 576), (7, 33, 65), (300, 64, 64), (1, 512, 512)])
@pytest.mark.parametrize("turned", [False, True])
def test_products_are_as_exact(shape: tuple[int, int, int], turned: bool) -> None:
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(rows, inner, generator=generator), torch.randn(columns, inner, generator=generator).T
    if turned:
        left, right = right.T, left.T
    exact = left.double() @ right.double()
    with float32_products(CPU):
        error = float((left @ right - exact).abs().max())
    assert error <= AS_EXACT * float((left @ right - exact).abs().max()) + 1e-6


def test_precision_is_put_back_and_that_of_others_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_suits", lambda: True)
    with pytest.raises(ValueError, match="in between"), float32_products(CPU):
        assert torch.get_float32_matmul_precision() == "medium"
        with float32_products(CPU):
            pass
        assert torch.get_float32_matmul_precision() == "medium"
        raise ValueError("in between")
    assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision("high")
    with float32_products(CPU):
        assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")
    with float32_products(torch.device("meta")):
        assert torch.get_float32_matmul_precision() == "highest"


def suits(monkeypatch: pytest.MonkeyPatch, vendor: str, **has: bool) -> bool:
    onednn_suits.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    return onednn_suits()


def test_it_is_for_processors_that_compute_in_float32_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_as_exact", lambda: True)
    assert suits(monkeypatch, "AuthenticAMD", avx512_f=True)
    assert not suits(monkeypatch, "AuthenticAMD", avx512_f=False)
    assert not suits(monkeypatch, "GenuineIntel", avx512_f=True)
    assert not suits(monkeypatch, "AuthenticAMD", avx512_f=True, amx_bf16=True)
    monkeypatch.setattr(products, "_as_exact", lambda: False)
    assert not suits(monkeypatch, "AuthenticAMD", avx512_f=True)


def test_the_vendor_is_what_linux_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(products, "_CPUINFO", file)
    assert products._vendor() == ""
    file.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t: fpu\n")
    assert products._vendor() == "AuthenticAMD"


def test_events_are_told_in_torchs_own_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who listens to a run multiplies as always."""
    monkeypatch.setattr(products, "onednn_suits", lambda: True)
    for _ in quantize(make(), recipe(tmp_path)):
        assert torch.get_float32_matmul_precision() == "highest"
    tune(make(), tmp_path / "scales", "opt_rtn", scale_steps=1)
    assert torch.get_float32_matmul_precision() == "highest"
