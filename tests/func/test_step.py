"""Lifting, stepping and tuning: eager against compiled, one compilation for equal blocks, RTN as zero steps."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from autoround import func as F
from autoround.errors import ModelError
from autoround.func.init import search_params
from autoround.func.observe import second_moments

SIZE = 32


class Block(nn.Module):
    """A residual block with a bias, a buffer, a bystander layer and a call with a keyword argument."""

    def __init__(self, layer_idx: int, scale: float = 1.0) -> None:
        super().__init__()
        self.layer_idx, self.scale = layer_idx, scale
        self.up, self.down = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE, bias=False)
        self.register_buffer("gain", torch.full((SIZE,), 1.5), persistent=False)

    def forward(self, x: Tensor, *, shift: Tensor) -> tuple[Tensor, None]:
        return x + self.scale * self.gain * self.down(nn.functional.silu(self.up(x) + shift)), None


def make_batch(block: nn.Module, seed: int = 0) -> F.Batch:
    x = torch.randn(2, 5, SIZE, generator=torch.Generator().manual_seed(seed))
    shift = torch.full((1,), 0.1)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 3:] = False
    return F.Batch(F.Call((x,), {"shift": shift}), block(x, shift=shift)[0].detach(), valid)


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block(0)


SPECS = {"up": F.QuantSpec(bits=2, group_size=16), "down": F.QuantSpec(bits=3, group_size=-1, sym=False)}


def test_a_lifted_block_equals_its_module_and_leaves_it_alone(block: Block) -> None:
    batch, before = make_batch(block), {name: tensor.clone() for name, tensor in block.state_dict().items()}
    block_fn = F.make_block_fn(block)
    assert torch.equal(block_fn(F.block.block_tensors(block), batch.call), batch.target_BTD)
    assert all(tensor.is_meta for tensor in block_fn.skeleton.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())
    assert set(vars(block)) == set(vars(Block(0)))


def test_signature_ignores_position_but_not_arithmetic() -> None:
    signature = F.make_block_fn(Block(0)).signature
    assert F.make_block_fn(Block(7)).signature == signature
    assert F.make_block_fn(Block(0, scale=0.5)).signature != signature


def test_a_step_lowers_the_loss_and_stays_in_bounds(block: Block) -> None:
    result = tune(block, steps=30)
    assert float(result.losses_K[-1]) < 0.8 * float(result.losses_K[0])
    for params in result.params.values():
        assert float(params.offset_OGS.abs().max()) <= 0.5
        assert float(torch.stack([params.clip_min_OG, params.clip_max_OG]).max()) <= 1.0


def tune(block: nn.Module, steps: int) -> F.TuneResult:
    weights, optimizer = F.split_weights(block, SPECS), F.signsgd(F.linear_decay(0.02, max(steps, 1)))
    step = F.make_step(F.make_block_fn(block), SPECS, optimizer)
    state = F.init_state(F.init_params(weights.tuned), optimizer)
    return F.tune_block(step, weights, state, [make_batch(block)] * steps)


def test_rtn_is_zero_steps(block: Block) -> None:
    weights, result = F.split_weights(block, SPECS), tune(block, steps=0)
    assert len(result.losses_K) == 0
    for path, spec in SPECS.items():
        prepared = weights.tuned[path]
        codes = F.quantize(prepared, result.params[path], spec)
        plain = F.quantize(prepared, F.init_params({path: prepared})[path], spec)
        assert all(torch.equal(own, other) for own, other in zip(codes, plain, strict=True))


def test_best_parameters_belong_to_the_lowest_loss(block: Block) -> None:
    weights = F.split_weights(block, SPECS)
    optimizer = F.signsgd(F.constant(0.3))  # too large on purpose: the loss goes up and down
    step = F.make_step(F.make_block_fn(block), SPECS, optimizer)
    state, batch, seen = F.init_state(F.init_params(weights.tuned), optimizer), make_batch(block), []
    for _ in range(12):
        before = state.params
        state, loss = step(weights, state, batch)
        seen.append((float(loss), before))
    best_loss, best_params = min(seen, key=lambda pair: pair[0])
    assert float(state.best_loss) == best_loss
    assert best_loss < seen[-1][0]
    assert torch.equal(state.best_params["up"].offset_OGS, best_params["up"].offset_OGS)


def test_compiled_step_is_one_graph_shared_by_equal_blocks() -> None:
    torch.manual_seed(0)
    first, second = Block(0), Block(1)
    optimizer, counter = F.signsgd(F.linear_decay(0.02, 5)), CompileCounterWithBackend("inductor")
    step = torch.compile(
        F.make_step(F.make_block_fn(first), SPECS, optimizer), fullgraph=True, dynamic=False, backend=counter
    )
    for block in (first, second):
        weights = F.split_weights(block, SPECS)
        state = F.init_state(F.init_params(weights.tuned), optimizer)
        compiled = F.tune_block(step, weights, state, (make_batch(block, seed) for seed in range(5)))
        eager_step = F.make_step(F.make_block_fn(block), SPECS, optimizer)
        eager = F.tune_block(eager_step, weights, state, (make_batch(block, seed) for seed in range(5)))
        torch.testing.assert_close(compiled.losses_K, eager.losses_K, rtol=1e-3, atol=1e-7)
        for path, spec in SPECS.items():
            ours, theirs = (F.quantize(weights.tuned[path], result.params[path], spec) for result in (compiled, eager))
            flips = (ours.q_OI != theirs.q_OI).float().mean()
            assert float(flips) < 0.02
    assert counter.frame_count == 1


def test_micro_batches_sum_to_the_whole_batch(block: Block) -> None:
    weights, optimizer = F.split_weights(block, SPECS), F.sgd(F.constant(1.0))
    gradient, update = F.make_gradient(F.make_block_fn(block), SPECS), F.make_update(optimizer, SPECS)
    state, batch = F.init_state(F.init_params(weights.tuned), optimizer), make_batch(block)
    rows = [
        F.Batch(
            F.Call((batch.call.args[0][i : i + 1],), batch.call.kwargs),
            batch.target_BTD[i : i + 1],
            batch.valid_BT[i : i + 1],
        )
        for i in range(2)
    ]
    whole, loss = F.make_step(F.make_block_fn(block), SPECS, optimizer)(weights, state, batch)
    parts, parts_loss = F.accumulate([gradient] * 2, update)([weights] * 2, state, rows)
    torch.testing.assert_close(parts_loss, loss)
    torch.testing.assert_close(parts.params["up"].offset_OGS, whole.params["up"].offset_OGS)


def test_micro_batches_are_computed_where_they_are(block: Block) -> None:
    """Fake tensors know their devices and refuse to mix them, on any machine; autograd does not work with them."""
    weights, optimizer = F.split_weights(block, SPECS), F.signsgd(F.constant(0.1))
    state, batch = F.init_state(F.init_params(weights.tuned), optimizer), make_batch(block)
    mode = FakeTensorMode()
    fake_weights, fake_state, fake_batch = tree_map(mode.from_tensor, (weights, state, batch))

    def gradient(own: F.BlockWeights, params: F.Params, rows: F.Batch) -> tuple[F.Params, Tensor]:
        value = (rows.target_BTD * own.frozen["gain"]).sum()
        return tree_map(lambda leaf: leaf * value, params), value

    def on(index: int, tree: Any) -> Any:
        return tree_map(lambda leaf: leaf.to(f"cuda:{index}"), tree)

    with mode:
        places, home = [0, 0, 1, 2], on(0, fake_state)
        replicas, batches = ([on(index, each) for index in places] for each in (fake_weights, fake_batch))
        step = F.accumulate([gradient] * 4, F.make_update(optimizer, SPECS))
        after, loss = step(replicas, home, batches)
        with pytest.raises(RuntimeError, match="cuda:1"):
            step(replicas[:1] * 4, home, batches)
    assert {leaf.device for leaf in tree_leaves((after, loss))} == {torch.device("cuda:0")}


def test_padding_does_not_count(block: Block) -> None:
    batch = make_batch(block)
    output = batch.target_BTD + 1.0
    spoiled = torch.where(batch.valid_BT.unsqueeze(-1), output, 1e6)
    assert F.mse(spoiled, batch.target_BTD, batch.valid_BT).item() == pytest.approx(1.0)


def test_a_loss_that_is_not_finite_stops_with_the_step(block: Block) -> None:
    weights, optimizer = F.split_weights(block, SPECS), F.signsgd(F.constant(0.1))
    step = F.make_step(
        F.make_block_fn(block), SPECS, optimizer, loss=lambda output, target, valid: output.sum() * torch.inf
    )
    state = F.init_state(F.init_params(weights.tuned), optimizer)
    with pytest.raises(ModelError, match="at step 0"):
        F.tune_block(step, weights, state, [make_batch(block)])


def test_no_loss_of_a_step_is_kept() -> None:
    """Small tensors that stay between a step's large ones would break up the heap of a CPU."""
    returned: list[weakref.ref[Tensor]] = []

    def step(weights: None, state: F.TuneState, batch: int) -> tuple[F.TuneState, Tensor]:
        loss = torch.tensor(float(batch))
        returned.append(weakref.ref(loss))
        return state, loss

    state = F.TuneState({}, (), {}, torch.tensor(torch.inf), torch.tensor(0))
    result = F.tune_block(step, None, state, range(300))
    assert result.losses_K.tolist() == [float(batch) for batch in range(300)]
    assert [loss() for loss in returned[:-1]] == [None] * 299


def test_a_path_without_weight_is_named(block: Block) -> None:
    with pytest.raises(ModelError, match="nowhere: found no weight"):
        F.split_weights(block, {"nowhere": F.QuantSpec(group_size=16)})


def test_moments_are_those_of_the_layer_inputs(block: Block) -> None:
    batch, seen = make_batch(block), []
    hook = block.down.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    block(*batch.call.args, **batch.call.kwargs)
    hook.remove()
    moments = second_moments(
        F.make_block_fn(block), F.block.block_tensors(block), [(batch.call, batch.valid_BT)], SPECS
    )
    torch.testing.assert_close(moments["down"], seen[0][batch.valid_BT].square().mean(0))
    torch.testing.assert_close(moments["up"], batch.call.args[0][batch.valid_BT].square().mean(0))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_searched_clips_never_lose_to_full_ranges(block: Block, bits: int, sym: bool) -> None:
    specs = {"down": F.QuantSpec(bits=bits, group_size=16, sym=sym)}
    weights, moment_I = F.split_weights(block, specs), torch.rand(2 * SIZE) ** 3

    def error(params: F.Params) -> float:
        rounded_OI = F.fake_quantize(weights.tuned["down"], params["down"], specs["down"])
        return float(((rounded_OI - block.down.weight.detach()).square() * moment_I).sum())

    assert error(search_params(weights, {"down": moment_I}, specs)) < 0.95 * error(F.init_params(weights.tuned))
