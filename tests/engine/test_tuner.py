"""What a block is tuned on, where it starts, and by which optimizer."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoround import func
from autoround.backends.base import Numerics
from autoround.backends.host import KEPT_BYTES
from autoround.data.tokens import load_calibration
from autoround.engine import quantize
from autoround.errors import ModelError
from autoround.func.init import search_clips
from autoround.journal import Journal
from autoround.recipe import Recipe
from autoround.schedule import batch_rows, make_optimizer
from autoround.tuner import BlockTuner
from tests.engine.small import ROWS, TOKENS, codes, equal_share, make, pin, recipe, replaced, rows, tune
from tests.model.test_carry import gemma4

FLOAT32 = Numerics(device="cpu", dtype="float32", attention="eager", compiler=None, threads=1, micro_batches=1)


@settings(deadline=None)
@given(st.integers(-(2**70), 2**70), st.integers(0, 200), st.integers(1, 20), st.integers(1, 8), st.integers(0, 30))
def test_batches_are_epochs_of_whole_batches(seed: int, block: int, count: int, batch_size: int, steps: int) -> None:
    """And a function of seed, block and step alone, so that a run that goes on sees the same ones."""
    batches = [batch.tolist() for batch in batch_rows(seed, block, count, batch_size, steps)]
    torch.manual_seed(seed % 7)
    again = [batch.tolist() for batch in batch_rows(seed, block, count, batch_size, steps + 3)]
    assert batches == again[:steps]
    assert {len(batch) for batch in batches} <= {min(batch_size, count)}
    per_epoch = max(count // batch_size, 1)
    for start in range(0, steps, per_epoch):
        epoch = [row for batch in batches[start : start + per_epoch] for row in batch]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(count))


def test_seeds_blocks_and_epochs_have_orders_of_their_own() -> None:
    def order(seed: int, block: int, epoch: int) -> tuple[int, ...]:
        return tuple(list(batch_rows(seed, block, 50, 50, epoch + 1))[epoch].tolist())

    cases = [(seed, block, epoch) for seed in range(4) for block in range(4) for epoch in range(4)]
    assert len({order(*case) for case in cases}) == len(cases)


def updates(made: Recipe, *grads: float, bits: int = 4) -> list[tuple[float, float]]:
    """What steps with these gradients would change offsets and clips by."""
    optimizer, one = make_optimizer(made, {"q_proj": func.QuantSpec(bits=bits)}), torch.ones(1)
    params = {"q_proj": func.RoundingParams(one, one, one)}
    state, found = optimizer.init(params), []
    for grad in grads:
        gradient = {"q_proj": func.RoundingParams(one * grad, one * grad, one * grad)}
        changes, state = optimizer.update(gradient, state, params)
        offset, clip_min, clip_max = changes["q_proj"]
        assert clip_min == clip_max
        found.append((pytest.approx(offset.item(), rel=1e-4), pytest.approx(clip_min.item(), rel=1e-4)))
    return found


def test_the_recipe_decides_the_optimizer() -> None:
    assert updates(Recipe(iters=4), 3.0, -2.0, 0.1, bits=2) == [(-0.25, -0.25), (0.1875, 0.1875), (-0.125, -0.125)]
    assert updates(Recipe(iters=4), 3.0, bits=3) == updates(Recipe(iters=4), 3.0) == [(-0.125, -0.125)]
    assert updates(Recipe(iters=2, lr=0.5), 1.0, 1.0, 1.0) == [(-0.5, -0.5), (-0.25, -0.25), (0.0, 0.0)]
    assert updates(Recipe(iters=2, lr=0.5, minmax_lr=0.1), 1.0) == [(-0.5, -0.1)]
    assert updates(Recipe(iters=1000), 1.0, bits=2) == [(-0.002, -0.002)]
    assert updates(Recipe(iters=1000), 1.0, bits=3) == [(-0.001, -0.001)]
    specs = {"up": func.QuantSpec(bits=2), "down": func.QuantSpec(bits=4)}
    optimizer, one = make_optimizer(Recipe(iters=4), specs), torch.ones(1)
    params = dict.fromkeys(specs, func.RoundingParams(one, one, one))
    changes, _ = optimizer.update(params, optimizer.init(params), params)
    assert [changes[path].offset_OGS.item() for path in specs] == [-0.25, -0.125]
    assert updates(Recipe(iters=4, momentum=0.9), 3.0, -2.0, bits=2) == [(-0.25, -0.25), (-0.1875, -0.1875)]
    assert updates(Recipe(iters=4, adam=True), 3.0, bits=2) == [(-0.25, -0.25)]
    assert updates(Recipe(iters=4, adam=True), 3.0, -2.0, bits=2)[1] != (0.1875, 0.1875)


def calibration_order() -> Tensor:
    """The rows of ``recipe`` in the order in which a run has them."""
    return load_calibration(rows(), None, nsamples=ROWS, seqlen=TOKENS, batch_size=4, seed=42).tokens_NT


def test_the_next_block_is_fed_float_and_quantized_outputs(tmp_path: Path) -> None:
    model, made = make(), recipe(tmp_path)
    run = quantize(model, pin(model, made, dtype="float32"))
    next(iter(run))
    kept = Journal(run.journal_folder, {}).activations.read(0)
    list(run)
    for name, source in (("float_NTD", model), ("quantized_NTD", replaced("llama", run))):
        with torch.no_grad():
            outputs = source(input_ids=calibration_order(), output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(kept[name], outputs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(kept["float_NTD"], kept["quantized_NTD"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sym", [True, False])
def test_the_clip_search_weighs_channels_by_their_inputs(sym: bool, tmp_path: Path) -> None:
    model, seen = make(), []
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[::3] *= 20
    run = tune(model, tmp_path, "opt_rtn", dtype="float32", sym=sym, compensate=False)
    path = "model.layers.0.self_attn.v_proj"
    layer, spec = model.get_submodule(path), run.plan.specs[path]
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=calibration_order())
    hook.remove()
    prepared, moment_I = func.prepare(layer.weight.detach(), spec), seen[0].square().flatten(0, 1).mean(0)
    weighted, plain = (func.quantize(prepared, search_clips(prepared, each, spec), spec) for each in (moment_I, None))
    found = codes(run)[path].scale_OG
    assert float((found == weighted.scale_OG).float().mean()) > 0.99
    assert float((found == plain.scale_OG).float().mean()) < 0.9


def test_a_block_with_nothing_to_quantize_passes_through(tmp_path: Path) -> None:
    tuner = BlockTuner(recipe(tmp_path, "rtn"), FLOAT32, [torch.device("cpu")], on_step=lambda done, loss: None)
    block = torch.nn.Sequential(torch.nn.Linear(8, 8))
    tuned = tuner.tune(0, func.make_block_fn(block), dict(block.state_dict()), {}, None)
    assert tuned.codes == {}
    assert len(tuned.losses_K) == 0
    assert tuned.stream is None


def test_a_layer_alone_is_quantized_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as in one piece; and the search is compiled once for each group size, whatever the bits."""
    made: list[object] = []
    monkeypatch.setattr("autoround.tuner.jit", lambda function, compiler: made.append(function) or function)
    monkeypatch.setattr("autoround.tuner.LAYER_ELEMENTS", 5 * 64)
    torch.manual_seed(0)
    weight_OI, moment_I = torch.randn(12, 64), torch.rand(64)
    tuner = BlockTuner(Recipe(clip_search=True), FLOAT32, [torch.device("cpu")], on_step=lambda done, loss: None)
    for spec in (func.QuantSpec(bits=bits, group_size=size) for size in (16, 32) for bits in (2, 8)):
        found = tuner.quantize_layer("head", weight_OI, spec, moment_I)
        prepared = func.prepare(weight_OI, spec)
        whole = func.quantize(prepared, search_clips(prepared, moment_I, spec), spec)
        assert all(torch.equal(own, other) for own, other in zip(found, whole, strict=True))
    assert len(made) == 2
    weight_OI[7, 3] = torch.nan
    with pytest.raises(ModelError, match="^head: found 1 NaN or infinite values"):
        tuner.quantize_layer("head", weight_OI, func.QuantSpec(group_size=16))


def test_the_first_step_is_compiled_beside_the_other_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a call on another thread that changes nothing; blocks of the same structure find it compiled."""
    threads: list[bool] = []

    def watched(function: Callable[..., Any], *, compiler: str | None) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if compiler and len(args) == 3:  # a step
                threads.append(threading.current_thread() is threading.main_thread())
            return function(*args)

        return call

    plain = tune(make(), tmp_path / "plain", dtype="float32", torch_compile=False)
    made = pin(make(), recipe(tmp_path / "ahead"), dtype="float32", compiler="inductor")
    monkeypatch.setattr("autoround.tuner.jit", watched)
    run = quantize(make(), made)
    assert len(list(run)) == 2
    assert threads == [False, *[True] * (6 * 2)]
    assert equal_share(codes(run), codes(plain)) == 1


def test_the_heap_is_trimmed_during_steps_and_after_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    monkeypatch.setattr("autoround.tuner.trim_heap", lambda own=0: kept.append(own))
    assert len(list(quantize(make(), recipe(tmp_path, iters=25)))) == 2
    assert kept == [KEPT_BYTES, KEPT_BYTES, 0] * 2


def test_blocks_that_hand_state_to_later_ones_are_compiled_at_their_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes out of them is wider than what flows in, which stands in for targets where compiling goes ahead."""
    monkeypatch.setattr("autoround.tuner.jit", lambda function, compiler: function)
    known = [[token % 48 for token in row] for row in rows()]
    made = pin(gemma4(), recipe(tmp_path, dataset=known), dtype="float32", compiler="inductor")
    run = quantize(gemma4(), made)
    assert run.numerics.compiler == "inductor"
    assert len(list(run)) == 4


@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_whose_layers_are_all_kept_take_no_steps(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path, ignore_layers="layers.0", clip_search=True)
    if compiled:
        pin(make(), made, compiler="inductor")
        monkeypatch.setattr("autoround.tuner.jit", lambda function, compiler: function)
    done = list(quantize(make(), made))
    assert [each.loss_first > 0 for each in done] == [False, True]
