"""Contracts of the grid of GGUF blocks over every type: the law, ranges, gradients, and what the search gains."""

import gguf
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoround import func as F
from autoround.errors import ModelError, UsageError
from autoround.func.grids.gguf import factors, ranges, scales
from tests.func.cases import GGUF_SPECS, random_params, weights_OI

# Of a minimum that float16 holds.
LARGEST = 6e4
K_QUANTS = [spec for spec in GGUF_SPECS if spec.layout.scale_bits]


@given(weights_OI(least=256), st.sampled_from(GGUF_SPECS), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_the_law_codes_mean_what_training_saw(weight_OI: Tensor, spec: F.GgufSpec, seed: int) -> None:
    prepared = F.prepare(weight_OI.clamp(-LARGEST, LARGEST), spec)
    params = random_params(prepared, seed)
    codes = F.quantize(prepared, params, spec)
    assert torch.equal(F.dequantize(codes, spec), F.fake_quantize(prepared, params, spec))


@given(weights_OI(least=256), st.sampled_from(GGUF_SPECS), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_codes_and_levels_stay_in_range(weight_OI: Tensor, spec: F.GgufSpec, seed: int) -> None:
    prepared = F.prepare(weight_OI.clamp(-LARGEST, LARGEST), spec)
    codes, layout = F.quantize(prepared, random_params(prepared, seed), spec), spec.layout
    groups = weight_OI.shape[1] // layout.group_size
    assert codes.q_OI.dtype == torch.uint8
    assert int(codes.q_OI.max()) <= spec.code_max
    assert codes.d_OK.dtype == torch.float16
    assert codes.d_OK.shape == (len(weight_OI), groups // layout.groups)
    assert codes.scale_OG.shape == (len(weight_OI), groups)
    levels = [codes.scale_OG] if isinstance(codes, F.SymBlockCodes) else [codes.scale_OG, codes.min_OG]
    assert isinstance(codes, F.SymBlockCodes) == spec.sym
    for level_OG in levels:
        assert level_OG.dtype == (torch.int8 if spec.sym else torch.uint8)
        if not layout.scale_bits:
            assert bool((level_OG == 1).all())
        elif spec.sym:
            assert -(2 ** (layout.scale_bits - 1)) <= int(level_OG.min())
            assert int(level_OG.max()) < 2 ** (layout.scale_bits - 1)
        else:
            assert int(level_OG.max()) < 2**layout.scale_bits


@pytest.mark.parametrize("spec", GGUF_SPECS, ids=str)
def test_legacy_types_are_as_good_as_the_gguf_package_and_wider_types_better(spec: F.GgufSpec) -> None:
    weight_OI = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    prepared = F.prepare(weight_OI, spec)
    error = float((F.fake_quantize(prepared, F.nearest(prepared), spec) - weight_OI).square().mean())
    assert error < 0.5 * 4.0 ** -(spec.bits - 1)
    if not spec.layout.scale_bits:
        kind = gguf.GGMLQuantizationType[spec.type.upper()]
        theirs = gguf.dequantize(gguf.quantize(weight_OI.numpy(), kind), kind)
        assert error <= 1.02 * float(numpy.square(theirs - weight_OI.numpy()).mean())


@pytest.mark.parametrize("spec", GGUF_SPECS, ids=str)
def test_gradients_are_those_of_scales_without_blocks(spec: F.GgufSpec) -> None:
    """Straight-through: the block's rounding of scales and minima passes gradients as if it were not there."""
    prepared = F.prepare(torch.randn(3, 256, generator=torch.Generator().manual_seed(1)), spec)
    params = random_params(prepared, 2)
    weight_OG = torch.randn(prepared.lo_OG.shape, generator=torch.Generator().manual_seed(3))
    for index in (0, 1):
        ours = torch.func.grad(lambda p, index=index: (scales(prepared, p, spec)[index] * weight_OG).sum())(params)
        plain = torch.func.grad(lambda p, index=index: (ranges(prepared, p, spec)[index] * weight_OG).sum())(params)
        assert all(torch.equal(own, other) for own, other in zip(ours, plain, strict=True))
    offsets = torch.func.grad(lambda p: F.fake_quantize(prepared, p, spec).sum())(params).offset_OGS
    inside = torch.where(offsets == 0, 0.0, scales(prepared, params, spec)[0].unsqueeze(-1).expand_as(offsets))
    torch.testing.assert_close(offsets, inside)
    assert float((offsets != 0).float().mean()) > 0.5


@pytest.mark.parametrize("spec", K_QUANTS, ids=str)
def test_stored_scales_are_stored_again_as_they_are(spec: F.GgufSpec) -> None:
    prepared = F.prepare(torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), spec)
    once = factors(ranges(prepared, F.nearest(prepared), spec)[0], spec)
    again = factors(once.product(), spec)
    assert torch.equal(once.product(), again.product())


@pytest.mark.parametrize("spec", GGUF_SPECS, ids=str)
def test_the_search_lowers_the_weighted_error(spec: F.GgufSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(32, 512, generator=generator) * 0.02
    moment_I = torch.rand(512, generator=generator).square() * 10 + 0.01
    prepared = F.prepare(weight_OI, spec)
    errors = []
    for params in (F.nearest(prepared), F.search_clips(prepared, moment_I, spec)):
        rounded_OI = F.fake_quantize(prepared, params, spec)
        errors.append(float(((rounded_OI - weight_OI).square() * moment_I).sum()))
    assert errors[1] < (0.9 if spec.bits < 8 else 0.99) * errors[0]


def test_zero_weights_and_blocks_of_one_sign() -> None:
    for spec in GGUF_SPECS:
        for weight_OI in (torch.zeros(1, 256), torch.full((1, 256), 0.5), torch.full((1, 256), -0.5)):
            prepared = F.prepare(weight_OI, spec)
            for params in (F.nearest(prepared), F.search_clips(prepared, None, spec)):
                rounded_OI = F.fake_quantize(prepared, params, spec)
                torch.testing.assert_close(rounded_OI, weight_OI, rtol=0.02, atol=0)


def test_unfit_rows_and_scales_beyond_float16_are_refused() -> None:
    with pytest.raises(UsageError, match="in_features 576 is not a multiple of 256, a block of Q4_K"):
        F.prepare(torch.ones(1, 576), F.GgufSpec(type="q4_k"))
    with pytest.raises(UsageError, match="found 'iq2_xs'; needed one of q4_0"):
        F.GgufSpec(type="iq2_xs")
    spec = F.GgufSpec(type="q4_1")
    prepared = F.prepare(torch.full((1, 32), -1e6), spec)
    with pytest.raises(ModelError, match="beyond float16"):
        F.quantize(prepared, F.nearest(prepared), spec)
