"""The packed linear layer against the dense one.

Legend: O output features, I input features, G groups in a row, M rows of x.
"""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from autoround import func
from autoround.formats.kernels import find_kernel
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
    exact = nn.functional.linear(x.float(), weight_OI.to(device), torch.arange(96.0, device=device))
    y = layer.to(device)(x)
    assert y.dtype == dtype
    assert y.shape == (*leading, 96)
    tolerance = 4 * torch.finfo(dtype).eps * float(exact.abs().max())
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=tolerance)


def test_outputs_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, weight_OI, _ = _layer("auto_gptq", QuantSpec(bits=3, group_size=32))
    monkeypatch.setattr("autoround.formats.packed._PART", 64 * 64)  # parts of 64 and 32 outputs
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
    layer.finish()
    assert torch.equal(layer.dequantize().t(), weight_OI[:, order])


def test_compiles_whole() -> None:
    layer, weight_OI, _ = _layer("auto_round:auto_gptq", QuantSpec(bits=3, group_size=32))
    x = torch.randn(2, 64)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), x @ weight_OI.t())


def _tiled(
    *, bits: int = 4, sym: bool = True, group_size: int = 64, shape: tuple[int, int] = (192, 576), bias: bool = False
) -> tuple[PackedLinear, IntCodes, QuantSpec]:
    """A layer that is held for a kernel, and its codes."""
    spec = QuantSpec(bits=bits, group_size=group_size, sym=sym)
    prepared = func.prepare(torch.randn(*shape, generator=torch.Generator().manual_seed(0)) + (not sym), spec)
    codes = func.quantize(prepared, func.init_params({"": prepared})[""], spec)
    own_bias = nn.Parameter(torch.linspace(-9, 9, shape[0]).bfloat16()) if bias else None
    layer = PackedLinear(get_format("gptq_v2").pack(codes, spec), zero_offset=0, bias=own_bias)
    layer.finish()
    if find_kernel(torch.device("cpu")) is None:
        pytest.skip("no kernel for this processor")
    assert layer.qweight is None
    return layer, codes, spec


def _rows(count: int, in_features: int = 576, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(count, in_features, generator=torch.Generator().manual_seed(count)).to(dtype)


def _counted(layer: PackedLinear) -> list[int]:
    """Lets the layer's kernel note the rows it multiplies."""
    kernel, calls = layer.kernel, list[int]()
    assert kernel is not None

    def multiply(x_MI: Tensor, tiles: Tensor, group: int, table_GO2: Tensor) -> Tensor:
        calls.append(len(x_MI))
        return kernel.multiply(x_MI, tiles, group, table_GO2)

    layer.kernel = kernel._replace(multiply=multiply)
    return calls


@pytest.mark.parametrize("group_size", [32, 64, 96, 192, -1])
@pytest.mark.parametrize(("bits", "sym"), [(3, True), (3, False), (4, True), (4, False)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_kernel_is_as_precise_as_bfloat16(bits: int, sym: bool, group_size: int, bias: bool) -> None:
    """Half a unit in the last place of bfloat16, for the scale, for ``(8 - zero) * scale``, for y and with the bias."""
    layer, codes, spec = _tiled(bits=bits, sym=sym, group_size=group_size, bias=bias)
    assert not sym or bool((codes.scale_OG < 0).any())
    calls, x = _counted(layer), _rows(5)
    weight_OI = func.dequantize(codes, spec)
    width = spec.group_of(576)
    shift_OI = ((8.0 - codes.zero_OG) * codes.scale_OG.float()).repeat_interleave(width, 1)
    exact, half_ulp = x.float() @ weight_OI.t(), torch.finfo(torch.bfloat16).eps / 2
    bound = half_ulp * (x.float().abs() @ (weight_OI.abs() + shift_OI.abs()).t() + exact.abs())
    if layer.bias is not None:
        exact = exact + layer.bias.detach().float()
        bound = bound + half_ulp * exact.abs()
    with torch.no_grad():
        y = layer(x)
    assert calls == [5]
    assert y.dtype == torch.bfloat16
    assert bool(((y.float() - exact).abs() <= 1.01 * bound).all())
    assert float((y.float() - exact).norm() / exact.norm()) < 2 * half_ulp  # most of it stays well within the bound


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("sym", [True, False])
def test_tiles_dequantize_exactly(bits: int, sym: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoround.formats.packed._PART", 64 * 576)  # packed and multiplied in parts of 64 outputs
    layer, codes, spec = _tiled(bits=bits, sym=sym, bias=True)
    weight_OI = func.dequantize(codes, spec)
    assert torch.equal(layer.dequantize().t(), weight_OI)
    assert torch.equal(layer.dequantize(64, 192).t(), weight_OI[64:])
    assert layer.bias is not None
    exact = nn.functional.linear(_rows(70).float(), weight_OI, layer.bias.detach().float())
    torch.testing.assert_close(layer(_rows(70).float()), exact)
    error = layer(_rows(70)).float() - exact
    assert float(error.detach().norm() / exact.norm()) < torch.finfo(torch.bfloat16).eps


def test_when_the_kernel_is_used() -> None:
    layer, _, _ = _tiled()
    calls = _counted(layer)
    with torch.no_grad():
        layer(_rows(64)[None])
        layer(_rows(1)[0])
        assert calls == [64, 1]
        layer(_rows(65))
        layer(_rows(0))
        layer(_rows(4, dtype=torch.float32))
        layer(_rows(4, dtype=torch.float16))
    x = _rows(4).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert calls == [64, 1]


@pytest.mark.parametrize(
    ("bits", "group_size", "shape"), [(2, 32, (64, 64)), (8, 32, (64, 64)), (4, 16, (64, 64)), (4, 32, (32, 64))]
)
def test_what_no_kernel_holds(bits: int, group_size: int, shape: tuple[int, int]) -> None:
    """2 bits would take twice the memory, 8 do not fit; the last has half as many outputs as a tile of AVX512."""
    spec = QuantSpec(bits=bits, group_size=group_size)
    prepared = func.prepare(torch.randn(shape, generator=torch.Generator().manual_seed(0)), spec)
    codes = func.quantize(prepared, func.init_params({"": prepared})[""], spec)
    layer = PackedLinear(get_format("gptq_v2").pack(codes, spec), zero_offset=0)
    layer.finish()
    kernel = find_kernel(torch.device("cpu"))
    assert layer.tiles is None or (shape == (32, 64) and kernel is not None and kernel.fits(*shape))
    x = _rows(4, 64)
    torch.testing.assert_close(layer(x), x @ func.dequantize(codes, spec).bfloat16().t(), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("bits", [3, 4])
def test_state_is_that_of_the_file(bits: int) -> None:
    layer, codes, spec = _tiled(bits=bits)
    tensors = get_format("gptq_v2").pack(codes, spec)
    state = layer.state_dict()
    assert set(state) == set(tensors)
    assert all(torch.equal(state[name], tensors[name]) for name in state)
    held = sum(buffer.nbytes for buffer in layer.buffers())
    assert held < {3: 1.5, 4: 1.2}[bits] * sum(tensor.nbytes for tensor in state.values())
    other = codes._replace(q_OI=codes.q_OI.flip(0))
    layer.load_state_dict(get_format("gptq_v2").pack(other, spec))
    assert layer.tiles is not None
    assert torch.equal(layer.dequantize().t(), func.dequantize(other, spec))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_changes_the_bias_only(dtype: torch.dtype) -> None:
    layer, codes, spec = _tiled(bias=True)
    layer.to(dtype)
    assert layer.bias is not None
    assert layer.bias.dtype == dtype
    assert torch.equal(layer.dequantize().t(), func.dequantize(codes, spec))
    assert layer.table is not None
    assert layer.table.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(layer.bfloat16()(_rows(2)), _tiled(bias=True)[0](_rows(2)))


def test_copies() -> None:
    layer, _, _ = _tiled(bias=True)
    x = _rows(3)
    with torch.no_grad():
        for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(same(x), layer(x))
            same.finish()
            assert torch.equal(same.dequantize(), layer.dequantize())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("columns", [512, 576])
def test_moving_to_another_device(columns: int) -> None:
    """The second is no multiple of the tiles of CUDA."""
    layer, codes, spec = _tiled(shape=(192, columns))
    layer.to("cuda")
    for place in ("cuda", "cpu"):
        layer.to(place)
        assert torch.equal(layer.dequantize().t().cpu(), func.dequantize(codes, spec))


def test_the_kernel_compiles_whole() -> None:
    layer, _, _ = _tiled(bias=True)
    with torch.no_grad():
        x = _rows(3)
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
