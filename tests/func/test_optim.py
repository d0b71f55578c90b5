"""Optimizers against torch's own, and the algebra of chain, partition and project."""

import pytest
import torch
from torch import Tensor

from autoround import func as F

STEPS = 7


def _run(optimizer: F.Transform, params: dict[str, Tensor], grads: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update(grad, state, params)
        params = F.apply_updates(params, updates)
    return params


def _grads() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"a": torch.randn(3, generator=generator), "b": torch.randn(2, 2, generator=generator)} for _ in range(STEPS)
    ]


def _params() -> dict[str, Tensor]:
    return {"a": torch.ones(3), "b": torch.full((2, 2), -1.0)}


def _torch_run(make: type[torch.optim.Optimizer], settings: dict[str, float], sign: bool) -> dict[str, Tensor]:
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in _params().items()}
    optimizer = make(list(leaves.values()), **settings)  # type: ignore[arg-type]
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=STEPS)
    for grad in _grads():
        for name, leaf in leaves.items():
            leaf.grad = grad[name].sign() if sign else grad[name]
        optimizer.step()
        decay.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_follows_torch(weight_decay: float) -> None:
    ours = _run(F.adamw(F.linear_decay(0.01, STEPS), weight_decay=weight_decay), _params(), _grads())
    theirs = _torch_run(torch.optim.AdamW, {"lr": 0.01, "weight_decay": weight_decay}, sign=False)
    torch.testing.assert_close(ours, theirs)


def test_signsgd_follows_sgd_on_signs() -> None:
    ours = _run(F.signsgd(F.linear_decay(0.5, STEPS)), _params(), _grads())
    torch.testing.assert_close(ours, _torch_run(torch.optim.SGD, {"lr": 0.5}, sign=True))


def test_momentum_accumulates_before_the_sign() -> None:
    optimizer = F.signsgd(F.constant(1.0), momentum=0.9)
    grads = [{"x": torch.tensor(10.0)}, {"x": torch.tensor(-1.0)}]
    assert _run(optimizer, {"x": torch.tensor(0.0)}, grads)["x"].item() == -2.0
    assert _run(F.signsgd(F.constant(1.0)), {"x": torch.tensor(0.0)}, grads)["x"].item() == 0.0


def test_partition_by_field_gives_offsets_and_clips_their_own_rates() -> None:
    params = {"q": F.RoundingParams(torch.zeros(1, 1, 2), torch.ones(1, 1), torch.ones(1, 1))}
    grads = {"q": F.RoundingParams(torch.ones(1, 1, 2), torch.ones(1, 1), torch.ones(1, 1))}
    optimizer = F.partition({"offset": F.signsgd(F.constant(0.1)), "clip": F.signsgd(F.constant(0.01))}, F.by_field)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert [round(leaf.flatten()[0].item(), 4) for leaf in updates["q"]] == [-0.1, -0.01, -0.01]


def test_partition_names_labels_without_a_transform() -> None:
    with pytest.raises(ValueError, match=r"labels \['clip'\] without a transform"):
        F.partition({"offset": F.signsgd(F.constant(0.1))}, F.by_field).init(
            {"q": F.RoundingParams(*(torch.zeros(1) for _ in range(3)))}
        )


def test_chain_asks_for_states_from_its_init() -> None:
    with pytest.raises(ValueError, match="make them with its init"):
        F.chain(F.sign(), F.sign()).update({}, ((),), {})


def test_project_keeps_interior_points_and_moves_the_others_to_the_bounds() -> None:
    params = {"q": F.RoundingParams(torch.tensor([[[-0.7, 0.2]]]), torch.tensor([[-0.1]]), torch.tensor([[1.2]]))}
    inside = F.project(params, {"q": F.QuantSpec()})["q"]
    assert [leaf.flatten().tolist() for leaf in inside] == [[-0.5, pytest.approx(0.2)], [0.0], [1.0]]
    inside = F.project(params, {"q": F.GgufSpec(type="q4_k")})["q"]
    assert [leaf.flatten().tolist() for leaf in inside] == [[-0.5, pytest.approx(0.2)], [0.0], [pytest.approx(1.2)]]
