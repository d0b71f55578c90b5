"""Optimizers as pairs of pure functions: ``init(params)`` and ``update(grads, state, params)``, as in optax.

Updates are added to parameters by ``apply_updates``; constraints are ``project``'s business, not the optimizer's.
Parameters may lie on several devices.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from autoround.func.rounding import bounds
from autoround.func.types import Params, RoundingParams
from autoround.spec import WeightSpec

Schedule = Callable[[Tensor], Tensor]


class Transform(NamedTuple):
    """An optimizer.

    Attributes:
        init: params -> state.
        update: (grads, state, params) -> (updates, new state); all pytrees shaped like params.
        alone: whether every number is updated by its own gradient and state alone, so that some rows of a weight may
            be updated at a time; the state then holds tensors shaped like params, and numbers that count for all.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]
    alone: bool = False


def constant(value: float) -> Schedule:
    """A learning rate that never changes.

    >>> constant(0.1)(torch.tensor(7)).item()
    0.10000000149011612
    """
    return lambda step: torch.full((), value, device=step.device)


def linear_decay(start: float, steps: int) -> Schedule:
    """``start * (1 - step / steps)``, and 0 afterwards: SignRound's schedule (arXiv 2309.05516, section 4.1).

    >>> [round(linear_decay(1.0, 4)(torch.tensor(step)).item(), 2) for step in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    return lambda step: start * (1 - step.float() / steps).clamp(min=0)


def warm_up(schedule: Schedule, steps: int) -> Schedule:
    """The same, after so many steps that rise to it in equal parts.

    >>> [warm_up(constant(1.0), 4)(torch.tensor(step)).item() for step in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return lambda step: schedule(step) * ((step + 1) / max(steps, 1)).clamp(max=1)


def sgd(schedule: Schedule) -> Transform:
    """Gradient descent: ``update = -lr(step) * grad``.

    >>> optimizer = sgd(constant(0.5))
    >>> params = {"x": torch.tensor([1.0])}
    >>> optimizer.update({"x": torch.tensor([2.0])}, optimizer.init(params), params)[0]["x"].tolist()
    [-1.0]
    """

    def init(params: Any) -> Tensor:
        return _step_zero(params)

    def update(grads: Any, step: Tensor, params: Any) -> tuple[Any, Tensor]:
        del params  # not needed
        rate = schedule(step)
        return tree_map(lambda grad: -rate.to(grad.device) * grad, grads), step + 1

    return Transform(init, update, alone=True)


def sign() -> Transform:
    """Replace each gradient by its sign, 0 where it is 0.

    >>> sign().update({"x": torch.tensor([-3.0, 0.0])}, (), None)[0]["x"].tolist()
    [-1.0, 0.0]
    """
    return Transform(lambda params: (), lambda grads, state, params: (tree_map(torch.sign, grads), state), alone=True)


def trace(momentum: float) -> Transform:
    """Accumulate gradients: ``buffer = momentum * buffer + grad``, and pass the buffer on.

    >>> ema = trace(0.5)
    >>> _, state = ema.update({"x": torch.tensor(1.0)}, ema.init({"x": torch.tensor(0.0)}), None)
    >>> ema.update({"x": torch.tensor(1.0)}, state, None)[0]["x"].item()
    1.5
    """

    def update(grads: Any, buffer: Any, params: Any) -> tuple[Any, Any]:
        del params  # not needed
        buffer = tree_map(lambda old, grad: momentum * old + grad, buffer, grads)
        return buffer, buffer

    return Transform(lambda params: tree_map(torch.zeros_like, params), update, alone=True)


def chain(*transforms: Transform) -> Transform:
    """Apply transforms one after the other, each to the updates of the one before.

    >>> chain(sign(), sgd(constant(1.0))).update({"x": torch.tensor(9.0)}, ((), torch.tensor(0)), None)[0]["x"].item()
    -1.0
    """

    def init(params: Any) -> tuple[Any, ...]:
        return tuple(transform.init(params) for transform in transforms)

    def update(grads: Any, states: tuple[Any, ...], params: Any) -> tuple[Any, tuple[Any, ...]]:
        if len(states) != len(transforms):
            raise ValueError(f"chain: found {len(states)} states; needed {len(transforms)}; make them with its init")
        new_states = []
        for transform, state in zip(transforms, states, strict=True):
            grads, new_state = transform.update(grads, state, params)
            new_states.append(new_state)
        return grads, tuple(new_states)

    return Transform(init, update, alone=all(transform.alone for transform in transforms))


def signsgd(schedule: Schedule, *, momentum: float = 0.0) -> Transform:
    """Sign gradient descent: ``update = -lr(step) * sign(buffer)`` (SignRound, arXiv 2309.05516, section 3.2).

    Args:
        schedule: step (0-d) -> learning rate, in units of the parameter.
        momentum: in [0, 1); 0 keeps no buffer.

    >>> optimizer = signsgd(linear_decay(0.5, 10))
    >>> params = {"x": torch.tensor([1.0, 1.0])}
    >>> optimizer.update({"x": torch.tensor([3.0, -1e-9])}, optimizer.init(params), params)[0]["x"].tolist()
    [-0.5, 0.5]
    """
    return chain(trace(momentum), sign(), sgd(schedule)) if momentum else chain(sign(), sgd(schedule))


class AdamState(NamedTuple):
    """Step count and the running moments of the gradient."""

    step: Tensor
    mean: Any
    square: Any


def adamw(
    schedule: Schedule, *, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> Transform:
    """AdamW (arXiv 1711.05101): bias-corrected moments, decay decoupled from the gradient.

    >>> optimizer = adamw(constant(0.1))
    >>> params = {"x": torch.tensor([1.0])}
    >>> updates, _ = optimizer.update({"x": torch.tensor([5.0])}, optimizer.init(params), params)
    >>> round(updates["x"].item(), 4)
    -0.1
    """

    def init(params: Any) -> AdamState:
        return AdamState(_step_zero(params), tree_map(torch.zeros_like, params), tree_map(torch.zeros_like, params))

    def update(grads: Any, state: AdamState, params: Any) -> tuple[Any, AdamState]:
        step = state.step + 1
        mean = tree_map(lambda old, grad: beta1 * old + (1 - beta1) * grad, state.mean, grads)
        square = tree_map(lambda old, grad: beta2 * old + (1 - beta2) * grad * grad, state.square, grads)
        rate = schedule(state.step)
        mean_scale = 1 / (1 - beta1 ** step.float())
        square_scale = 1 / (1 - beta2 ** step.float())

        def direction(m: Tensor, s: Tensor, param: Tensor) -> Tensor:
            own_rate, own_mean, own_square = (each.to(param.device) for each in (rate, mean_scale, square_scale))
            return -own_rate * (m * own_mean / ((s * own_square).sqrt() + eps) + weight_decay * param)

        return tree_map(direction, mean, square, params), AdamState(step, mean, square)

    return Transform(init, update, alone=True)


def by_field(params: Params) -> dict[str, RoundingParams]:
    """Label each leaf of ``Params``: "offset" or "clip".

    >>> zero = torch.zeros(1)
    >>> by_field({"up": RoundingParams(zero, zero, zero)})["up"]
    RoundingParams(offset_OGS='offset', clip_min_OG='clip', clip_max_OG='clip')
    """
    labels = RoundingParams("offset", "clip", "clip")  # type: ignore[arg-type]
    return dict.fromkeys(params, labels)


def partition(transforms: Mapping[str, Transform], label: Callable[[Any], Any]) -> Transform:
    """Give each leaf to the transform that its label names.

    Args:
        transforms: label -> transform.
        label: params -> pytree of labels with the same structure.

    Raises:
        ValueError: a leaf has a label without a transform.

    >>> optimizer = partition({"a": sgd(constant(1.0)), "b": sgd(constant(2.0))}, lambda params: {"x": "a", "y": "b"})
    >>> params = {"x": torch.tensor(0.0), "y": torch.tensor(0.0)}
    >>> grads = {"x": torch.tensor(1.0), "y": torch.tensor(1.0)}
    >>> {name: update.item() for name, update in optimizer.update(grads, optimizer.init(params), params)[0].items()}
    {'x': -1.0, 'y': -2.0}
    """

    def leaves_by_label(tree: Any, labels: list[str]) -> dict[str, list[Tensor]]:
        leaves, _ = tree_flatten(tree)
        return {name: [leaf for leaf, own in zip(leaves, labels, strict=True) if own == name] for name in transforms}

    def init(params: Any) -> dict[str, Any]:
        labels, _ = tree_flatten(label(params))
        if unknown := sorted(set(labels) - set(transforms)):
            raise ValueError(f"partition: found labels {unknown} without a transform; needed among {list(transforms)}")
        return {name: transforms[name].init(part) for name, part in leaves_by_label(params, labels).items()}

    def update(grads: Any, states: dict[str, Any], params: Any) -> tuple[Any, dict[str, Any]]:
        labels, _ = tree_flatten(label(params))
        grad_parts, param_parts = leaves_by_label(grads, labels), leaves_by_label(params, labels)
        results = {name: transforms[name].update(grad_parts[name], states[name], param_parts[name])
                   for name in transforms}  # fmt: skip
        updates = {name: iter(result[0]) for name, result in results.items()}
        merged = [next(updates[name]) for name in labels]
        return tree_unflatten(merged, tree_flatten(grads)[1]), {name: result[1] for name, result in results.items()}

    return Transform(init, update, alone=all(transform.alone for transform in transforms.values()))


def by_path(transform: Transform) -> Transform:
    """Give every weight a state of its own, if the transform treats numbers alone; else the same transform.

    >>> optimizer = by_path(sgd(constant(0.5)))
    >>> optimizer.init({"up": torch.tensor([1.0])})
    {'up': tensor(0)}
    """
    return _by_path(lambda path: transform, alone=True) if transform.alone else transform


def each_path(transforms: Mapping[str, Transform]) -> Transform:
    """Give every weight a transform of its own.

    >>> optimizer = each_path({"up": sgd(constant(0.5)), "down": sgd(constant(1.0))})
    >>> params = {"up": torch.tensor([1.0]), "down": torch.tensor([1.0])}
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> {path: own.item() for path, own in updates.items()}
    {'up': -0.5, 'down': -1.0}
    """
    return _by_path(transforms.__getitem__, alone=all(own.alone for own in transforms.values()))


def _by_path(of: Callable[[str], Transform], *, alone: bool) -> Transform:
    def init(params: Any) -> dict[str, Any]:
        return {path: of(path).init({path: own}) for path, own in params.items()}

    def update(grads: Any, states: dict[str, Any], params: Any) -> tuple[Any, dict[str, Any]]:
        found = {path: of(path).update({path: own}, states[path], {path: params[path]}) for path, own in grads.items()}
        return {path: own[path] for path, (own, _) in found.items()}, {path: own for path, (_, own) in found.items()}

    return Transform(init, update, alone=alone)


def apply_updates(params: Any, updates: Any) -> Any:
    """``params + updates``, leaf by leaf.

    >>> apply_updates({"x": torch.tensor(1.0)}, {"x": torch.tensor(-0.25)})["x"].item()
    0.75
    """
    return tree_map(torch.add, params, updates)


def project(params: Params, specs: Mapping[str, WeightSpec]) -> Params:
    """Put every parameter back inside the bounds of its grid.

    >>> from autoround.spec import QuantSpec
    >>> clip = torch.tensor([[1.5]])
    >>> params = {"up": RoundingParams(torch.tensor([[[-0.7]]]), clip, clip)}
    >>> project(params, {"up": QuantSpec()})["up"].clip_max_OG.item()
    1.0
    """
    return {path: _inside(leaves, *bounds(specs[path])) for path, leaves in params.items()}


def _inside(leaves: RoundingParams, lower: RoundingParams, upper: RoundingParams) -> RoundingParams:
    return RoundingParams(*(leaf.clamp(lo, hi) for leaf, lo, hi in zip(leaves, lower, upper, strict=True)))


def _step_zero(params: Any) -> Tensor:
    leaves = tree_flatten(params)[0]
    return torch.zeros((), dtype=torch.int64, device=leaves[0].device if leaves else None)
