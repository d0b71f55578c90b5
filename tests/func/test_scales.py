"""Scales of rounded blocks: gradients are those of the composed block, and what is stored is what was tuned."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoround import func as F
from autoround.errors import ModelError
from tests.func.cases import GGUF_SPECS, SPECS, weights_OI

ALL = [*SPECS[::5], *GGUF_SPECS]


def rounded(weight_OI: Tensor, spec: F.WeightSpec) -> F.Codes:
    prepared = F.prepare(weight_OI, spec)
    return F.quantize(prepared, F.nearest(prepared), spec)


@settings(deadline=None)
@given(st.sampled_from(ALL), weights_OI(least=256))
def test_factors_of_one_change_nothing(spec: F.WeightSpec, weight_OI: Tensor) -> None:
    try:
        codes = {"up": rounded(weight_OI, spec)}
    except ModelError:  # beyond float16
        return
    factors = F.init_factors(codes)
    stored = F.store_scales(codes, factors)["up"]
    assert type(stored) is type(codes["up"])
    assert all(torch.equal(one, two) and one.dtype == two.dtype for one, two in zip(stored, codes["up"], strict=True))
    own = F.rounded_tensors(F.RoundedBlock(codes, {}), factors, {"up": spec}, torch.float32)["up.weight"]
    assert torch.equal(own, F.dequantize(codes["up"], spec))


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_gradients_are_those_of_finite_differences(spec: F.WeightSpec) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256, bias=False)).requires_grad_(False)
    specs = dict.fromkeys(("0", "2"), spec)
    codes = {path: rounded(block.get_parameter(f"{path}.weight"), spec) for path in specs}
    rounded_block = F.RoundedBlock(codes, {"0.bias": block[0].bias})
    x_BTD, cotangent_BTD = torch.randn(2, 3, 256), torch.randn(2, 3, 256)
    factors, block_fn = F.init_factors(codes), F.make_block_fn(block)
    apply = F.make_apply(block_fn, specs, dtype=torch.float32)
    pull = F.make_pull(block_fn, specs, dtype=torch.float32, hidden=0)
    grads, pulled_BTD = pull(rounded_block, factors, F.Call((x_BTD,), {}), cotangent_BTD)

    def value(own: dict[str, dict[str, Tensor]], x: Tensor) -> float:
        return float((apply(rounded_block, own, F.Call((x,), {})).double() * cotangent_BTD).sum())

    direction = torch.randn_like(x_BTD)
    step = 1e-2
    slope = (value(factors, x_BTD + step * direction) - value(factors, x_BTD - step * direction)) / (2 * step)
    assert slope == pytest.approx(float((pulled_BTD * direction).sum()), rel=2e-2, abs=2e-2)
    for path, fields in factors.items():
        for name, factor in fields.items():
            along = torch.randn_like(factor)
            ends = [{**factors, path: {**fields, name: factor + sign * step * along}} for sign in (1, -1)]
            slope = (value(ends[0], x_BTD) - value(ends[1], x_BTD)) / (2 * step)
            assert slope == pytest.approx(float((grads[path][name] * along).sum()), rel=2e-2, abs=2e-2)


def test_factors_stay_near_one() -> None:
    factors = {"up": {"scale_OG": torch.tensor([-1.0, 0.7, 9.0])}}
    assert F.keep_near(factors)["up"]["scale_OG"].tolist() == pytest.approx([0.5, 0.7, 2.0])


def test_a_scale_beyond_its_dtype_is_refused() -> None:
    codes = {"up": F.IntCodes(torch.tensor([[0, 3]]), torch.tensor([[60000.0]]).half(), torch.tensor([[2]]))}
    with pytest.raises(ModelError, match=r"up: found a tuned scale beyond torch.float16; use fewer scale_steps"):
        F.store_scales(codes, {"up": {"scale_OG": torch.tensor([[1.5]])}})
