"""Stacks of experts as layers of many rows: lifted, observed, searched and tuned."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoround import func as F
from autoround.func.block import block_tensors, stack_paths
from autoround.func.experts import also_in_turn, in_even_groups, observe, restore
from autoround.func.observe import observe_inputs
from tests.engine.mixtures import MODELS, make

STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SPECS = (F.QuantSpec(bits=2, group_size=32, sym=False), F.QuantSpec(bits=4, group_size=16), F.GgufSpec(type="q4_0"))


class Mixture(nn.Module):
    """The part of a block with experts, as a block."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__()
        self.mlp = make(name, **settings).model.layers[1].mlp

    def forward(self, x_BTD: Tensor) -> Tensor:
        found = self.mlp(x_BTD)
        return found[0] if isinstance(found, tuple) else found


def tokens(rows: int = 2) -> Tensor:
    return torch.randn(rows, 12, 64, generator=torch.Generator().manual_seed(1))


def call(x_BTD: Tensor) -> tuple[F.Call, Tensor]:
    return F.Call((x_BTD,), {}), torch.ones(x_BTD.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("name", MODELS)
def test_a_lifted_mixture_computes_what_its_module_does(name: str) -> None:
    block, x_BTD = Mixture(name), tokens()
    tensors = block_tensors(block)
    assert stack_paths(block) == STACKS
    assert [tensors[f"{path}.weight"].ndim for path in STACKS] == [2, 2]
    with torch.no_grad():  # equal but for the order of sums, where the module stores its weights (I, O)
        torch.testing.assert_close(F.make_block_fn(block)(tensors, F.Call((x_BTD,), {})), block(x_BTD))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_expert_is_quantized_by_itself_and_as_training_saw_it(spec: F.WeightSpec) -> None:
    block = Mixture("mixtral")
    weights = F.split_weights(block, dict.fromkeys(STACKS, spec))
    for path, prepared in weights.tuned.items():
        params = F.nearest(prepared)._replace(offset_OGS=torch.rand_like(prepared.weight_OGS) - 0.5)
        codes = F.quantize(prepared, params, spec)
        assert torch.equal(F.dequantize(codes, spec), F.fake_quantize(prepared, params, spec))
        for expert, weight_OI in enumerate(block.get_parameter(path)):
            rows = slice(expert * len(weight_OI), (expert + 1) * len(weight_OI))
            alone = F.prepare(weight_OI.detach(), spec)
            own = F.quantize(alone, type(params)(*(field[rows] for field in params)), spec)
            assert all(torch.equal(field[rows], one) for field, one in zip(codes, own, strict=True))


def test_experts_that_no_token_reaches_do_not_move() -> None:
    block = Mixture("mixtral")
    specs = dict.fromkeys(STACKS, F.QuantSpec(bits=2, group_size=32))
    weights, optimizer = F.split_weights(block, specs), F.signsgd(F.constant(0.01))
    x_BTD = tokens(1)[:, :1].expand(1, 12, 64)  # one token again and again, which takes two experts of four
    chosen = block.mlp.gate(x_BTD[0])[2].unique().tolist()
    assert len(chosen) == 2
    state = F.init_state(F.init_params(weights.tuned), optimizer)
    batch = F.Batch(call(x_BTD)[0], torch.zeros_like(x_BTD), torch.ones(1, 12, dtype=torch.bool))
    moved, _ = F.make_step(F.make_block_fn(block), specs, optimizer)(weights, state, batch)
    for path in STACKS:
        offset_EN = moved.params[path].offset_OGS.view(4, -1)
        assert [bool(offset_N.any()) for offset_N in offset_EN] == [expert in chosen for expert in range(4)]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_moments_are_those_of_the_tokens_that_each_expert_takes(name: str) -> None:
    block, x_BTD = Mixture(name), tokens()
    observed = observe_inputs(
        F.make_block_fn(block), block_tensors(block), [call(row) for row in x_BTD[:, None]], STACKS
    )
    x_ND = x_BTD.flatten(0, 1)
    router = block.mlp.gate if name == "mixtral" else block.mlp.router
    choice_NK = router(x_ND)[2]
    assert observed.tokens["mlp.experts"].tolist() == choice_NK.flatten().bincount(minlength=4).tolist()
    for expert in range(4):
        x_MD = x_ND[(choice_NK == expert).any(-1)]
        torch.testing.assert_close(observed.moments[STACKS[0]][expert], x_MD.square().mean(0))
    whole = torch.ones(len(x_ND), dtype=torch.bool)
    again = observe(block.mlp.experts, x_ND, choice_NK, whole).moments(len(x_ND))
    torch.testing.assert_close(observed.moments[STACKS[1]], again["down_proj"])


def test_down_projections_are_weighed_by_what_flows_into_them() -> None:
    block, x_ND = Mixture("mixtral"), tokens()[0]
    experts, choice_NK = block.mlp.experts, torch.tensor([[0, 1]] * 12)
    found = observe(experts, x_ND, choice_NK, torch.arange(12) < 9).moments(9)
    gate_NF, up_NF = (x_ND[:9] @ experts.gate_up_proj[1].T).chunk(2, -1)
    torch.testing.assert_close(found["down_proj"][1], (nn.functional.silu(gate_NF) * up_NF).square().mean(0))
    assert torch.equal(found["down_proj"][2], torch.ones(64))
    torch.testing.assert_close(found["gate_up_proj"][2], x_ND[:9].square().mean(0))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_clips_are_searched_for_each_expert_by_its_own_inputs(spec: F.WeightSpec) -> None:
    stack_EOI = make("mixtral").model.layers[0].mlp.experts.down_proj.detach()
    moment_EI = torch.rand(4, 64, generator=torch.Generator().manual_seed(2)) ** 4
    together = F.search_clips(F.prepare(stack_EOI.flatten(0, 1), spec), moment_EI, spec)
    for expert, weight_OI in enumerate(stack_EOI):
        alone = F.search_clips(F.prepare(weight_OI, spec), moment_EI[expert], spec)
        rows = slice(expert * len(weight_OI), (expert + 1) * len(weight_OI))
        assert all(torch.equal(field[rows], own) for field, own in zip(together, alone, strict=True))


def test_restored_experts_are_where_they_started() -> None:
    prepared = F.prepare(torch.ones(6, 4), F.QuantSpec(group_size=2))
    start = F.nearest(prepared)
    tuned = type(start)(*(field - 0.25 for field in start))
    found = restore(tuned, start, torch.tensor([False, True, False]))
    for field, before, after in zip(found, start, tuned, strict=True):
        assert torch.equal(field[2:4], before[2:4])
        assert torch.equal(field[[0, 1, 4, 5]], after[[0, 1, 4, 5]])


STARVED = torch.tensor([False, True, False, True])


@pytest.mark.parametrize("name", MODELS)
def test_starved_experts_are_sent_every_token_in_turn(name: str) -> None:
    block, x_BTD = Mixture(name), tokens(1)
    tensors, plain = block_tensors(block), F.make_block_fn(block)
    seen: list[tuple[Tensor, ...]] = []
    block.mlp.experts.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True
    )
    with torch.no_grad():
        block(x_BTD)
        changed, turns = also_in_turn(plain, {"mlp.experts": STARVED})
        found = changed({**tensors, **turns}, call(x_BTD)[0]) - plain({**tensors, **turns}, call(x_BTD)[0])
        x_ND, _, share_NK = seen[0]
        choice_N1 = torch.tensor([1, 3] * 6)[:, None]
        wanted = block.mlp.experts(x_ND, choice_N1, share_NK.mean(-1, keepdim=True))
    torch.testing.assert_close(found[0], wanted, rtol=1e-3, atol=1e-4)
    plainly, besides = (
        observe_inputs(each, {**tensors, **turns}, [call(x_BTD)], STACKS).tokens["mlp.experts"]
        for each in (plain, changed)
    )
    assert torch.equal(plainly[~STARVED], besides[~STARVED])
    assert bool((besides[STARVED] >= 6).all())


def test_blocks_with_other_starved_experts_share_a_step() -> None:
    block = F.make_block_fn(Mixture("mixtral"))
    one, two = (also_in_turn(block, {"mlp.experts": each}) for each in (STARVED, ~STARVED))
    assert one[0].signature == two[0].signature != block.signature
    assert [{name: turn.tolist() for name, turn in turns.items()} for _, turns in (one, two)] == [
        {"mlp.experts.turn_E": [1, 3, 1, 3]}, {"mlp.experts.turn_E": [0, 2, 0, 2]}]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("starved", [False, True])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_step_compiles_whole_in_bfloat16(starved: bool) -> None:
    block = Mixture("qwen3_moe").bfloat16()
    specs = dict.fromkeys(STACKS, F.QuantSpec(bits=2, group_size=32))
    weights, optimizer = F.split_weights(block, specs), F.signsgd(F.constant(0.01))
    state, x_BTD = F.init_state(F.init_params(weights.tuned), optimizer), tokens().bfloat16()
    batch = F.Batch(call(x_BTD)[0], torch.zeros_like(x_BTD), torch.ones(2, 12, dtype=torch.bool))
    block_fn = F.make_block_fn(block)
    if starved:
        block_fn, turns = also_in_turn(block_fn, {"mlp.experts": STARVED})
        weights = weights._replace(frozen={**weights.frozen, **turns})
    step = F.make_step(block_fn, specs, optimizer, dtype=torch.bfloat16)
    _, eager = step(weights, state, batch)
    _, compiled = torch.compile(step, fullgraph=True, dynamic=False)(weights, state, batch)
    torch.testing.assert_close(compiled, eager, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("multiple", [8, 32])
def test_even_groups_change_neither_outputs_nor_gradients(name: str, multiple: int) -> None:
    block, x_BTD = Mixture(name), tokens()
    specs = dict.fromkeys(STACKS, F.QuantSpec(bits=2, group_size=32))
    weights, plain = F.split_weights(block, specs), F.make_block_fn(block)
    even = in_even_groups(plain, multiple)
    own, valid_BT = call(x_BTD)
    batch = F.Batch(own, torch.zeros_like(x_BTD), valid_BT)
    found = [F.make_gradient(each, specs)(weights, F.init_params(weights.tuned), batch) for each in (plain, even)]
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("choices", [1, 2])
def test_every_expert_is_given_whole_groups(choices: int) -> None:
    block = Mixture("mixtral")
    even = in_even_groups(F.make_block_fn(block), 8)
    experts = even.skeleton.get_submodule("mlp.experts")
    generator = torch.Generator().manual_seed(choices)
    choice_NK = torch.randint(3, (40, choices), generator=generator)  # nobody takes the last one
    (hook,) = experts._forward_pre_hooks.values()
    (x_ND, filled_NK, share_NK), _ = hook(experts, (torch.ones(40, 64), choice_NK, torch.ones(40, choices)), {})
    assert torch.equal(filled_NK[:40], choice_NK)
    assert not x_ND[40:].any() and not share_NK[40:].any()
    assert filled_NK.numel() == 40 * choices + 4 * 7  # enough for four experts; the last one takes what is over
    assert (filled_NK.flatten().bincount(minlength=4) % 8).tolist() == [0, 0, 0, 4]
