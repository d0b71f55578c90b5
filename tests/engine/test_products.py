"""Products of float32 tensors by the faster library: as exact, and only where work is done."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autoround import loop
from autoround.backends import products
from autoround.backends.products import AS_EXACT, float32_products, onednn_suits
from autoround.engine import quantize
from autoround.scales import ScaleTuner
from autoround.tuner import BlockTuner
from tests.engine.small import make, recipe, tune

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def highest() -> Iterator[None]:
    """What is kept of the processor is forgotten, and torch's precision stays what it was."""
    onednn_suits.cache_clear()
    yield
    onednn_suits.cache_clear()
    found = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    assert found == "highest"


@pytest.mark.skipif(not onednn_suits(), reason="this processor's float32 products are MKL's")
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


def test_work_is_done_with_them_and_blocks_are_told_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_suits", lambda: True)
    seen: dict[str, set[str]] = {}

    def watched(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def call(*args: object, **kwargs: object) -> object:
            seen.setdefault(name, set()).add(torch.get_float32_matmul_precision())
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((BlockTuner, "tune"), (loop, "captured"), (ScaleTuner, "_step")):
        watched(owner, name)
    for _ in quantize(make(), recipe(tmp_path)):
        assert torch.get_float32_matmul_precision() == "highest"
    tune(make(), tmp_path / "scales", "opt_rtn", scale_steps=1)
    assert seen == {name: {"medium"} for name in ("tune", "captured", "_step")}


def test_the_last_of_those_that_overlap_puts_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_suits", lambda: True)
    first, second = float32_products(CPU), float32_products(CPU)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "medium"
    second.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "highest"
