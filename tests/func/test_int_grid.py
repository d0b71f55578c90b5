"""Contracts of the integer grid over every spec: the law, ranges, nearest rounding, gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoround import func as F
from autoround.errors import ModelError, UsageError
from autoround.func.grids.int import scales
from autoround.func.grids.straight import round_to_dtype
from autoround.func.rounding import bounds, nearest
from tests.func.cases import SPECS, random_params, weights_OI


@given(weights_OI(), st.sampled_from(SPECS), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_the_law_codes_mean_what_training_saw(weight_OI: Tensor, spec: F.QuantSpec, seed: int) -> None:
    prepared = F.prepare(weight_OI, spec)
    params = random_params(prepared, seed)
    codes = F.quantize(prepared, params, spec)
    assert torch.equal(F.dequantize(codes, spec), F.fake_quantize(prepared, params, spec))


@given(weights_OI(), st.sampled_from(SPECS), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_codes_scales_and_zero_points_stay_in_range(weight_OI: Tensor, spec: F.QuantSpec, seed: int) -> None:
    prepared = F.prepare(weight_OI, spec)
    codes = F.quantize(prepared, random_params(prepared, seed), spec)
    assert codes.q_OI.dtype == codes.zero_OG.dtype == torch.uint8
    assert codes.scale_OG.dtype == getattr(torch, spec.scale_dtype)
    assert int(codes.q_OI.max()) <= spec.code_max
    assert int(codes.zero_OG.min()) >= spec.zero_min
    assert int(codes.zero_OG.max()) <= spec.code_max
    assert float(codes.scale_OG.abs().min()) >= spec.scale_floor
    if spec.sym:
        assert bool((codes.zero_OG == spec.midpoint).all())
    else:
        assert bool((codes.scale_OG > 0).all())


@given(weights_OI(), st.sampled_from(SPECS))
@settings(max_examples=100, deadline=None)
def test_without_offsets_each_weight_takes_a_nearest_grid_value(weight_OI: Tensor, spec: F.QuantSpec) -> None:
    prepared = F.prepare(weight_OI, spec)
    params = nearest(prepared)
    scale_OG, zero_OG = scales(prepared, params, spec)
    rounded_OGS = F.fake_quantize(prepared, params, spec).view_as(prepared.weight_OGS)
    grid_OGK = scale_OG.unsqueeze(-1) * (torch.arange(spec.code_max + 1) - zero_OG.unsqueeze(-1))
    nearest_OGS = (grid_OGK.unsqueeze(-2) - prepared.weight_OGS.unsqueeze(-1)).abs().amin(-1)
    slack = 1e-5 * prepared.weight_OGS.abs().amax() + 1e-6 * scale_OG.abs().unsqueeze(-1)
    assert bool(((rounded_OGS - prepared.weight_OGS).abs() <= nearest_OGS + slack).all())


def test_symmetric_grid_is_full_range_with_signed_scales() -> None:
    spec = F.QuantSpec(bits=4, group_size=4)
    prepared = F.prepare(torch.tensor([[-8.0, 1, 2, 3, 8.5, -1, 2, 3]]), spec)
    codes = F.quantize(prepared, nearest(prepared), spec)
    assert codes.scale_OG.tolist() == [[1.0, -1.0625]]
    assert codes.q_OI[0, [0, 4]].tolist() == [0, 0]


def test_zero_min_moves_the_zero_point_not_the_law() -> None:
    spec = F.QuantSpec(bits=4, group_size=4, sym=False, zero_min=1)
    prepared = F.prepare(torch.tensor([[0.1, 0.2, 0.5, 1.0]]), spec)
    codes = F.quantize(prepared, nearest(prepared), spec)
    assert codes.zero_OG.tolist() == [[1]]
    assert torch.equal(F.dequantize(codes, spec), F.fake_quantize(prepared, nearest(prepared), spec))


@pytest.mark.parametrize("spec", SPECS[:: len(SPECS) // 24], ids=str)
def test_gradients_equal_a_plain_autograd_straight_through_estimator(spec: F.QuantSpec) -> None:
    prepared = F.prepare(torch.randn(3, 256, generator=torch.Generator().manual_seed(1)), spec)
    params = random_params(prepared, 2)
    weight_OI = torch.randn(3, 256, generator=torch.Generator().manual_seed(3))
    ours = torch.func.grad(lambda p: (F.fake_quantize(prepared, p, spec) * weight_OI).sum())(params)
    leaves = [leaf.clone().requires_grad_() for leaf in params]
    (_reference(prepared, leaves, spec) * weight_OI).sum().backward()
    for own, leaf in zip(ours, leaves, strict=True):
        torch.testing.assert_close(
            own, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, rtol=1e-4, atol=1e-5
        )


class _RoundSTE(torch.autograd.Function):
    """Classic autograd: round forward, identity backward."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


class _CastSTE(_RoundSTE):
    @staticmethod
    def forward(ctx: object, x: Tensor, dtype: str) -> Tensor:
        return x.to(getattr(torch, dtype)).float()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _reference(prepared: F.Prepared, leaves: list[Tensor], spec: F.QuantSpec) -> Tensor:
    offset, clip_min, clip_max = leaves
    lo, hi = prepared.lo_OG * clip_min, prepared.hi_OG * clip_max
    if spec.sym:
        positive = -lo > hi
        scale = _CastSTE.apply(torch.where(positive, -lo, -hi) / spec.midpoint, spec.scale_dtype)
        magnitude = scale.abs().clamp(min=spec.scale_floor)
        scale, zero = torch.where(positive, magnitude, -magnitude), torch.full_like(lo, spec.midpoint)
    else:
        scale = _CastSTE.apply((hi - lo) / spec.code_max, spec.scale_dtype).clamp(min=spec.scale_floor)
        zero = _RoundSTE.apply(-lo / scale).clamp(spec.zero_min, spec.code_max)
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    q = (_RoundSTE.apply(prepared.weight_OGS / scale + offset) + zero).clamp(0, spec.code_max)
    return (scale * (q - zero)).flatten(1)


def test_nan_weights_and_unfit_groups_are_refused() -> None:
    with pytest.raises(ModelError, match="1 NaN or infinite"):
        F.prepare(torch.tensor([[1.0, float("nan")]]), F.QuantSpec(group_size=2))
    with pytest.raises(UsageError, match="in_features 576 is not a multiple of group_size 128; use 32 or 64"):
        F.prepare(torch.ones(1, 576), F.QuantSpec(group_size=128))


def test_a_scale_beyond_its_dtype_is_refused() -> None:
    spec = F.QuantSpec(bits=2, group_size=2)
    prepared = F.prepare(torch.tensor([[1e6, 0.0]]), spec)
    with pytest.raises(ModelError, match="scale_dtype float32"):
        F.quantize(prepared, nearest(prepared), spec)


def test_bounds_are_the_documented_ranges() -> None:
    lower, upper = bounds(F.QuantSpec())
    assert (tuple(lower), tuple(upper)) == ((-0.5, 0.0, 0.0), (0.5, 1.0, 1.0))


def test_clips_get_float32_gradients_where_float16_ones_would_vanish() -> None:
    spec = F.QuantSpec(bits=4, group_size=32)
    prepared = F.prepare(torch.randn(2, 32, generator=torch.Generator().manual_seed(0)), spec)
    grads = torch.func.grad(lambda p: F.fake_quantize(prepared, p, spec).sum() * 1e-9)(nearest(prepared))
    assert float(grads.clip_min_OG.abs().sum() + grads.clip_max_OG.abs().sum()) > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("compiled", [False, True])
def test_scales_are_rounded_to_their_dtype_compiled_or_not(dtype: str, compiled: bool) -> None:
    x = torch.randn(2**14, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-8, 4, 2**14)
    rounding = torch.compile(round_to_dtype, fullgraph=True) if compiled else round_to_dtype
    assert torch.equal(rounding(x, dtype), x.to(getattr(torch, dtype)).float())
