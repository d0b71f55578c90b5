"""The packed linear layer against the dense one."""

import pytest
import torch
from torch import Tensor, nn

from autoround import func
from autoround.formats.packed import PackedLinear
from autoround.formats.registry import get_format
from autoround.func import IntCodes, QuantSpec

CASES = [
    pytest.param(name, bits, sym, id=f"{name}-{bits}-{'sym' if sym else 'asym'}")
    for name in ("auto_round:auto_gptq", "gptq_v2")
    for bits in (2, 3, 4, 8)
    for sym in (True, False)
]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


def _layer(name: str, spec: QuantSpec, *, bias: bool = False) -> tuple[PackedLinear, Tensor, IntCodes]:
    """A packed layer of 96 outputs and 64 inputs, its weight and its codes."""
    prepared = func.prepare(torch.randn(96, 64, generator=torch.Generator().manual_seed(0)), spec)
    codes = func.quantize(prepared, func.init_params({"": prepared})[""], spec)
    tensors = get_format(name).pack(codes, spec)
    own_bias = nn.Parameter(torch.arange(96.0)) if bias else None
    layer = PackedLinear(tensors, zero_offset=get_format(name).rules.zero_min, bias=own_bias)
    return layer, func.dequantize(codes, spec), codes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "bits", "sym"), CASES)
def test_the_weight_is_the_codes(name: str, bits: int, sym: bool, device: str) -> None:
    spec = QuantSpec(bits=bits, group_size=16, sym=sym, zero_min=get_format(name).rules.zero_min)
    layer, weight_OI, codes = _layer(name, spec)
    assert not sym or bool((codes.scale_OG < 0).any())  # the test means something for signed scales
    assert torch.equal(layer.to(device).dequantize().t().cpu(), weight_OI)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_forward(leading: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    layer, weight_OI, _ = _layer("auto_round:auto_gptq", QuantSpec(group_size=32), bias=True)
    layer.bias = nn.Parameter(torch.arange(96.0, dtype=dtype))
    x = torch.randn(*leading, 64, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    expected = nn.functional.linear(x, weight_OI.to(device, dtype), torch.arange(96, device=device).to(dtype))
    y = layer.to(device)(x)
    assert y.dtype == dtype
    assert y.shape == (*leading, 96)
    torch.testing.assert_close(y, expected)


def test_outputs_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, weight_OI, _ = _layer("auto_gptq", QuantSpec(bits=3, group_size=32))
    monkeypatch.setattr("autoround.formats.packed._CPU_CODES", 64 * 64)  # parts of 64 and 32 outputs
    x = torch.randn(4, 64)
    torch.testing.assert_close(layer(x), x @ weight_OI.t())


def test_gradients_reach_the_input() -> None:
    layer, weight_OI, _ = _layer("auto_round:auto_gptq", QuantSpec(group_size=32))
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight_OI.sum(0).expand(2, 64))


def test_reordered_columns() -> None:
    """With g_idx, a column's group is what it says: permuting columns and g_idx alike permutes the weight."""
    spec = QuantSpec(group_size=32)
    layer, weight_OI, codes = _layer("auto_gptq", spec)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    permuted = get_format("auto_gptq").pack(codes._replace(q_OI=codes.q_OI[:, order]), spec)
    layer.load_state_dict(permuted | {"g_idx": (order // 32).int()})
    layer.reordered = True
    assert torch.equal(layer.dequantize().t(), weight_OI[:, order])


def test_compiles_whole() -> None:
    layer, weight_OI, _ = _layer("auto_round:auto_gptq", QuantSpec(bits=3, group_size=32))
    x = torch.randn(2, 64)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), x @ weight_OI.t())
