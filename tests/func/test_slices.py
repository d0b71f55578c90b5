"""Rows of weights that are tuned some at a time are tuned as all at once."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from autoround import func as F
from autoround.func import slices
from tests.func.test_step import Block, make_batch

SPECS = {"up": F.QuantSpec(bits=2, group_size=16), "down": F.QuantSpec(bits=4, group_size=16, sym=False)}
OPTIMIZERS = {
    "signsgd": F.signsgd(F.linear_decay(0.02, 4)),
    "momentum": F.signsgd(F.linear_decay(0.02, 4), momentum=0.9),
    "adamw": F.adamw(F.constant(0.01), weight_decay=0.1),
    "partition": F.partition({"offset": F.sgd(F.constant(0.1)), "clip": F.adamw(F.constant(0.01))}, F.by_field),
}


def tune(optimizer: F.Transform, *, keep_best: bool = True) -> tuple[F.TuneState, list[torch.Tensor]]:
    torch.manual_seed(0)
    block, losses = Block(0), []
    weights = F.split_weights(block, SPECS)
    step = F.make_step(F.make_block_fn(block), SPECS, optimizer)
    state = F.init_state(F.init_params(weights.tuned), optimizer, keep_best=keep_best)
    for seed in range(4):
        before = [leaf.clone() for leaf in tree_leaves(state)]
        following, loss = step(weights, state, make_batch(block, seed))
        assert all(torch.equal(own, other) for own, other in zip(tree_leaves(state), before, strict=True))
        state = following
        losses.append(loss)
    return state, losses


@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_slices_step_as_the_whole_bit_for_bit(monkeypatch: pytest.MonkeyPatch, name: str, keep_best: bool) -> None:
    """Of an optimizer that may not be given some rows at a time, all are updated at once."""
    monkeypatch.setattr(slices, "CPU_WEIGHTS", 40)  # two or three rows
    monkeypatch.setattr(slices, "MOST", 1000)
    found = tune(OPTIMIZERS[name], keep_best=keep_best)
    monkeypatch.undo()
    whole = tune(F.Transform(OPTIMIZERS[name].init, OPTIMIZERS[name].update), keep_best=keep_best)
    assert torch.equal(torch.stack(found[1]), torch.stack(whole[1]))
    for field in ("params", "best_params", "best_loss", "step"):
        own, other = (tree_leaves(getattr(state, field)) for state, _ in (found, whole))
        assert len(own) == len(other)
        assert all(torch.equal(*pair) for pair in zip(own, other, strict=True)), field


def test_slices_are_all_rows_once() -> None:
    own = F.RoundingParams(torch.zeros(7, 2**7, 2**9), torch.zeros(7, 2**7), torch.zeros(7, 2**7))
    assert [row for rows in slices.slices(own) for row in range(7)[rows]] == list(range(7))
    assert len(list(slices.slices(own))) > 1
