"""Columns that make up for each other's rounding errors.

Legend: O output features, I input features, M inputs.
"""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoround import func as F
from autoround.errors import ModelError
from autoround.func.compensate import DAMPING
from autoround.func.observe import add_gram, observe_inputs
from autoround.func.rounding import grid_of

SPECS: list[F.WeightSpec] = [F.QuantSpec(bits=2, group_size=32, sym=sym) for sym in (True, False)]
SPECS += [F.QuantSpec(bits=4, group_size=-1), F.GgufSpec(type="q4_k"), F.GgufSpec(type="q4_0"), F.GgufSpec(type="q3_k")]
ROWS, COLUMNS = 24, 256


def inputs_MI(seed: int = 0, columns: int = COLUMNS) -> Tensor:
    """Inputs whose channels depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(400, 32, generator=generator) @ torch.randn(32, columns, generator=generator)
    return (mixed + torch.randn(400, columns, generator=generator)) * (0.1 + torch.rand(columns, generator=generator))


def hessian_of(x_MI: Tensor) -> Tensor:
    return x_MI.T @ x_MI / len(x_MI)


def moved(weight_OI: Tensor, hessian_II: Tensor, spec: F.WeightSpec) -> tuple[F.Prepared, F.Prepared, F.RoundingParams]:
    """A weight, the compensated one, and their clips."""
    prepared = F.prepare(weight_OI, spec)
    params = F.search_clips(prepared, hessian_II.diagonal(), spec)
    after = F.compensate({"up": prepared}, {"up": params}, {"up": hessian_II}, {"up": spec})["up"]
    return prepared, after, params


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_layers_output_is_kept_better(spec: F.WeightSpec) -> None:
    torch.manual_seed(0)
    weight_OI, x_MI = torch.randn(ROWS, COLUMNS), inputs_MI()
    prepared, after, params = moved(weight_OI, hessian_of(x_MI), spec)
    before_MO, after_MO = (x_MI @ (F.fake_quantize(each, params, spec) - weight_OI).T for each in (prepared, after))
    assert float(after_MO.square().mean()) < 0.6 * float(before_MO.square().mean())
    assert torch.equal(prepared.weight_OGS, F.prepare(weight_OI, spec).weight_OGS)  # left as it was
    assert torch.equal(after.lo_OG, prepared.lo_OG)
    assert torch.equal(after.hi_OG, prepared.hi_OG)


def by_elimination(prepared: F.Prepared, params: F.RoundingParams, hessian_II: Tensor, spec: F.WeightSpec) -> Tensor:
    """The definition (arXiv 2210.17323, equations 2 and 3): the inverse is updated column by column; (O, I)."""
    scale_OG, shift_OG = grid_of(spec).scales(prepared, params, spec)
    weight_OI, result_OI = prepared.weight_OGS.flatten(1).double(), torch.zeros(prepared.weight_OGS.flatten(1).shape)
    damped_II = hessian_II.double() + DAMPING * hessian_II.diagonal().mean() * torch.eye(len(hessian_II))
    inverse_II, size = torch.linalg.inv(damped_II), prepared.weight_OGS.shape[-1]
    for column in hessian_II.diagonal().argsort(descending=True).tolist():
        own = scale_OG[:, column // size, None], shift_OG[:, column // size, None]
        q_O11 = grid_of(spec).round_codes(weight_OI[:, column, None, None].float(), 0.0, *own, spec)
        result_OI[:, column] = grid_of(spec).values(q_O11, *own, spec).flatten()
        row_I, pivot = inverse_II[column].clone(), inverse_II[column, column]
        weight_OI -= torch.outer((weight_OI[:, column] - result_OI[:, column]) / pivot, row_I)
        inverse_II -= torch.outer(row_I, row_I) / pivot
    return result_OI


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(SPECS[:3]), st.integers(0, 2**32))
def test_it_is_what_the_definition_says(spec: F.WeightSpec, seed: int) -> None:
    hessian_II = hessian_of(inputs_MI(seed, columns=160))
    weight_OI = torch.randn(5, 160, generator=torch.Generator().manual_seed(seed))
    prepared, after, params = moved(weight_OI, hessian_II, spec)
    ours_OI, theirs_OI = F.fake_quantize(after, params, spec), by_elimination(prepared, params, hessian_II, spec)
    # one weight that falls to the other side of a tie changes all that come after it in its row
    same_O = (ours_OI - theirs_OI).abs().amax(1) < 1e-5
    assert int(same_O.sum()) >= 4


def test_layers_of_the_same_inputs_are_computed_together() -> None:
    torch.manual_seed(0)
    hessian_II, specs = hessian_of(inputs_MI()), dict(zip(("q", "k", "v"), (SPECS[0], SPECS[0], SPECS[1]), strict=True))
    tuned = {path: F.prepare(torch.randn(8, COLUMNS), spec) for path, spec in specs.items()}
    params = F.init_params(tuned)
    shared = F.compensate(tuned, params, dict.fromkeys(tuned, hessian_II), specs)
    alone = F.compensate(tuned, params, {path: hessian_II.clone() for path in tuned}, specs)
    for path in tuned:
        torch.testing.assert_close(shared[path].weight_OGS, alone[path].weight_OGS)


def test_layers_without_a_hessian_and_channels_without_inputs_stay() -> None:
    spec = F.QuantSpec(bits=2, group_size=32)
    x_MI = inputs_MI(columns=64)
    x_MI[:, 5:9] = 0
    tuned = dict.fromkeys(("up", "expert"), F.prepare(torch.randn(4, 64), spec))
    found = F.compensate(tuned, F.init_params(tuned), {"up": hessian_of(x_MI)}, dict.fromkeys(tuned, spec))
    assert found["expert"] is tuned["expert"]
    assert torch.equal(found["up"].weight_OGS.flatten(1)[:, 5:9], tuned["up"].weight_OGS.flatten(1)[:, 5:9])
    nothing = F.compensate(tuned, F.init_params(tuned), {"up": torch.zeros(64, 64)}, dict.fromkeys(tuned, spec))
    assert torch.equal(nothing["up"].weight_OGS, tuned["up"].weight_OGS)


def test_hessians_that_rounding_made_indefinite_are_damped_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["autoround.func.compensate"], "DAMPING", 1e-12)
    hessian_II = hessian_of(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) @ torch.ones(4, 96))
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(hessian_II + 1e-12 * hessian_II.diagonal().mean() * torch.eye(96))
    _, after, _ = moved(torch.randn(4, 96), hessian_II, SPECS[0])
    assert bool(after.weight_OGS.isfinite().all())


def test_hessians_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ModelError, match="needed finite inputs"):
        moved(torch.randn(4, 96), torch.full((96, 96), torch.nan), SPECS[0])


class Twins(nn.Module):
    """Two layers of the same inputs, and one of others."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down(self.gate(x) * self.up(x))
        return hidden


def test_hessians_are_observed_over_valid_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoround.func.observe.GRAM_COLUMNS", 4)  # of six, so that there are two tiles of unequal size
    torch.manual_seed(0)
    block, x, valid = Twins(), torch.randn(4, 3, 6), torch.rand(4, 3) > 0.3
    block_fn = F.make_block_fn(block)
    calls = [(F.Call((x[rows],), {}), valid[rows]) for rows in (slice(0, 2), slice(2, 4))]
    observed = observe_inputs(block_fn, block.state_dict(), calls, ["gate", "up", "down"], gram=add_gram)
    torch.testing.assert_close(observed.hessians["gate"], hessian_of(x[valid]))
    assert torch.equal(observed.hessians["gate"], observed.hessians["gate"].T)
    assert observed.hessians["up"] is observed.hessians["gate"]
    assert observed.moments["up"] is observed.moments["gate"]
    hidden_MI = (block.gate(x) * block.up(x))[valid].detach()
    torch.testing.assert_close(observed.hessians["down"], hessian_of(hidden_MI))
    torch.testing.assert_close(observed.moments["down"], hidden_MI.square().mean(0))
    assert observe_inputs(block_fn, block.state_dict(), calls, ["gate"]).hessians == {}


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_scales_are_refitted_by_least_squares(bits: int, sym: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["autoround.func.compensate"], "SOLVED", COLUMNS * 5)  # five rows at a time
    torch.manual_seed(0)
    spec = F.QuantSpec(bits=bits, group_size=32, sym=sym, scale_dtype="float32")
    weight_OI, x_MI = torch.randn(ROWS, COLUMNS), inputs_MI()
    hessian_II = hessian_of(x_MI)
    prepared, after, params = moved(weight_OI, hessian_II, spec)
    codes = {"up": F.quantize(after, params, spec)}
    found = F.refit_scales({"up": prepared}, codes, {"up": hessian_II}, {"up": spec})["up"]
    assert torch.equal(found.q_OI, codes["up"].q_OI)
    # the same as a regression on what each group alone makes of the inputs, damped by rows that stand for other inputs
    damping = DAMPING * hessian_II.diagonal().mean()
    all_MI = torch.cat([x_MI / len(x_MI) ** 0.5, damping.sqrt() * torch.eye(COLUMNS)]).double()
    for row in range(ROWS):
        own_I = F.dequantize(codes["up"], spec)[row].double()
        parts_MG = (all_MI * own_I).unflatten(1, (-1, 32)).sum(-1)
        factor_G = torch.linalg.lstsq(parts_MG, all_MI @ weight_OI[row].double()).solution
        torch.testing.assert_close(
            found.scale_OG[row] / codes["up"].scale_OG[row], factor_G.float(), rtol=1e-3, atol=1e-3
        )
    before, refitted = (
        (x_MI @ (F.dequantize(own, spec) - weight_OI).T).square().mean() for own in (codes["up"], found)
    )
    assert refitted < 0.99 * before


def test_a_group_without_a_say_keeps_its_scale() -> None:
    spec = F.QuantSpec(bits=2, group_size=2, scale_dtype="float32")
    tuned = {"up": F.prepare(torch.tensor([[1.2, -1.2, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1]]), spec)}
    own = F.IntCodes(torch.tensor([[3, 1, 2, 2], [2, 2, 2, 2]]), torch.ones(2, 2), torch.full((2, 2), 2))
    found = F.refit_scales(tuned, {"up": own}, {"up": torch.eye(4)}, {"up": spec})["up"]
    torch.testing.assert_close(found.scale_OG, torch.tensor([[1.2, 1.0], [1.0, 1.0]]))


def test_no_row_is_refitted_to_its_loss() -> None:
    """Groups that stand for each other are solved for together, and what lies beyond the range is cut off."""
    spec = F.QuantSpec(bits=2, group_size=1, scale_dtype="float32")
    hessian_II = torch.tensor([[1.0, 0.999], [0.999, 1.0]])
    weight_OI = torch.tensor([[6.0, -4.0], [2.0, 2.0]])
    own = F.IntCodes(torch.full((2, 2), 3), torch.ones(2, 2), torch.full((2, 2), 2))
    found = F.refit_scales({"up": F.prepare(weight_OI, spec)}, {"up": own}, {"up": hessian_II}, {"up": spec})["up"]
    before, after = ((F.dequantize(each, spec) - weight_OI) for each in (own, found))
    errors = [torch.einsum("oi,ij,oj->o", each, hessian_II, each) for each in (before, after)]
    assert (errors[1] <= errors[0]).all()
    assert errors[1][1] < 0.1 * errors[0][1]


def test_what_cannot_be_solved_keeps_its_scales() -> None:
    spec = F.QuantSpec(bits=2, group_size=2, scale_dtype="float32")
    tuned = {"up": F.prepare(torch.tensor([[1.2, -1.2]]), spec)}
    own = F.IntCodes(torch.tensor([[3, 1]]), torch.ones(1, 1), torch.full((1, 1), 2))
    found = F.refit_scales(tuned, {"up": own}, {"up": torch.full((2, 2), torch.inf)}, {"up": spec})["up"]
    assert torch.equal(found.scale_OG, own.scale_OG)
