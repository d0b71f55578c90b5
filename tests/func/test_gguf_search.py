"""The search for scales of GGUF blocks."""

import pytest
import torch

from autoround import func as F
from autoround.spec import GgufSpec


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_a_channel_with_huge_inputs_is_kept_nearly_whole(kind: str) -> None:
    """Its group decides the factors of the block, beyond the range of the weights if need be."""
    weight_OI = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    moment_I = torch.ones(256)
    moment_I[100] = 1e5
    spec = GgufSpec(type=kind)
    prepared = F.prepare(weight_OI, spec)
    rounded_OI = F.fake_quantize(prepared, F.search_clips(prepared, moment_I, spec), spec)
    error_OI = (rounded_OI - weight_OI).square()
    assert error_OI[:, 100].sum() < 1e-3 * weight_OI[:, 100].square().sum()
    plain_OI = F.fake_quantize(prepared, F.search_clips(prepared, None, spec), spec)
    assert error_OI.sum() < 4 * (plain_OI - weight_OI).square().sum()


@pytest.mark.parametrize("spec", [F.QuantSpec(bits=4, group_size=32), F.QuantSpec(bits=2, group_size=32, sym=False)])
def test_groups_without_inputs_are_searched_as_if_all_columns_counted(spec: F.QuantSpec) -> None:
    """An expert that few tokens reach may see zeros alone in some columns; others keep what their inputs say."""
    weight_OI = torch.rand(16, 96, generator=torch.Generator().manual_seed(0))  # none below zero
    moment_I = torch.rand(96, generator=torch.Generator().manual_seed(1))
    moment_I[32:64] = 0
    prepared = F.prepare(weight_OI, spec)
    found, alike = F.search_clips(prepared, moment_I, spec), F.search_clips(prepared, None, spec)
    for own, other in zip(found[1:], alike[1:], strict=True):
        assert torch.equal(own[:, 1], other[:, 1])
    moment_I[32:64] = 1
    whole = F.search_clips(prepared, moment_I, spec)
    assert all(torch.equal(own, other) for own, other in zip(found, whole, strict=True))
