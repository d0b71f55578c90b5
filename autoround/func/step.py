"""One tuning step as a pure function: gradient, update, projection (SignRound, arXiv 2309.05516, section 3.2)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from autoround.func import optim
from autoround.func.rounding import fake_quantize, nearest
from autoround.func.slices import Part, gathered, pulled_back, rows_of, slices, updated
from autoround.func.types import Batch, BlockFunction, BlockWeights, Params, Prepared, RoundingParams, TuneState
from autoround.spec import WeightSpec

Specs: TypeAlias = Mapping[str, WeightSpec]
Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
Projection: TypeAlias = Callable[[Params, Specs], Params]
Gradient: TypeAlias = Callable[[BlockWeights, Params, Batch], tuple[Params, Tensor]]
Pull: TypeAlias = Callable[[BlockWeights, Params, Batch], tuple[Tensor, Iterator[Part]]]
Update: TypeAlias = Callable[[TuneState, Params, Tensor], TuneState]
Step: TypeAlias = Callable[[BlockWeights, TuneState, Batch], tuple[TuneState, Tensor]]
Span: TypeAlias = tuple[int, int]
Total: TypeAlias = Callable[[Callable[[int], tuple[Params, Tensor]], int, tuple[Params, Tensor]], tuple[Params, Tensor]]

_NOTHING: Mapping[Span, Any] = MappingProxyType({})


def mse(output_BTD: Tensor, target_BTD: Tensor, valid_BT: Tensor) -> Tensor:
    """Mean squared error over valid tokens, in float32.

    >>> mse(torch.ones(1, 2, 3), torch.zeros(1, 2, 3), torch.tensor([[True, False]])).item()
    1.0
    """
    error_BTD = (output_BTD.float() - target_BTD.float()).square() * valid_BT.unsqueeze(-1)
    return error_BTD.sum() / (valid_BT.sum() * output_BTD.shape[-1])


def init_params(tuned: Mapping[str, Prepared]) -> Params:
    """Round-to-nearest parameters for every weight of a block.

    >>> from autoround.func.rounding import prepare
    >>> from autoround.spec import QuantSpec
    >>> prepared = prepare(torch.ones(2, 4), QuantSpec(group_size=4))
    >>> init_params({"up": prepared})["up"].clip_min_OG.tolist()
    [[1.0], [1.0]]
    """
    return {path: nearest(prepared) for path, prepared in tuned.items()}


def init_state(params: Params, optimizer: optim.Transform, *, keep_best: bool = True) -> TuneState:
    """State before the first step; with ``keep_best=False`` no second copy of the parameters is carried.

    >>> state = init_state({}, optim.signsgd(optim.constant(0.1)), keep_best=False)
    >>> state.best_loss.item(), state.step.item()
    (inf, 0)
    """
    device = next(iter(params.values())).offset_OGS.device if params else None
    return TuneState(
        params=params,
        opt_state=optim.by_path(optimizer).init(params),
        # copies: a compiled step would be traced once more for inputs that are one tensor twice
        best_params=tree_map(torch.clone, params) if keep_best else {},
        best_loss=torch.full((), torch.inf, device=device),
        step=torch.zeros((), dtype=torch.int64, device=device),
    )


def block_weights(weights: BlockWeights, params: Params, specs: Specs, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a block by name, the tuned ones fake-quantized and cast to the compute dtype.

    >>> from autoround.func.rounding import prepare
    >>> from autoround.spec import QuantSpec
    >>> specs = {"up": QuantSpec(bits=2, group_size=2)}
    >>> prepared = prepare(torch.tensor([[-2.0, 0.9]]), specs["up"])
    >>> weights = BlockWeights({"up": prepared}, {"up.bias": torch.ones(1)})
    >>> tensors = block_weights(weights, init_params(weights.tuned), specs, torch.bfloat16)
    >>> tensors["up.weight"].tolist(), tensors["up.bias"].tolist()
    ([[-2.0, 1.0]], [1.0])
    """
    tuned = {f"{path}.weight": fake_quantize(prepared, params[path], specs[path]).to(dtype)
             for path, prepared in weights.tuned.items()}  # fmt: skip
    return {**weights.frozen, **tuned}


def make_gradient(
    block_fn: BlockFunction, specs: Specs, *, loss: Loss = mse, dtype: torch.dtype = torch.float32
) -> Gradient:
    """Build ``(weights, params, batch) -> (gradient, loss)``.

    Args:
        block_fn: the lifted block.
        specs: module path relative to the block -> how its weight is stored.
        loss: (output_BTD, target_BTD, valid_BT) -> 0-d tensor.
        dtype: in which the block computes; parameters and gradients are float32 whatever it is.

    >>> from autoround.spec import QuantSpec
    >>> from autoround.func.block import make_block_fn, split_weights
    >>> from autoround.func.types import Call
    >>> block, specs = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)), {"0": QuantSpec(bits=2, group_size=2)}
    >>> _ = block[0].weight.data.copy_(torch.tensor([[1.0, -0.4]]))
    >>> weights, x = split_weights(block, specs), torch.ones(1, 1, 2)
    >>> batch = Batch(Call((x,), {}), block(x).detach(), torch.ones(1, 1, dtype=torch.bool))
    >>> grads, value = make_gradient(make_block_fn(block), specs)(weights, init_params(weights.tuned), batch)
    >>> round(value.item(), 4), [round(own, 4) for own in grads["0"].offset_OGS.flatten().tolist()]
    (0.01, [0.1, 0.1])
    """

    pull = _make_pull(block_fn, specs, loss, dtype)

    def gradient(weights: BlockWeights, params: Params, batch: Batch) -> tuple[Params, Tensor]:
        def objective(own: Params) -> Tensor:
            output_BTD = block_fn(block_weights(weights, own, specs, dtype), batch.call)
            return loss(output_BTD, batch.target_BTD, batch.valid_BT)

        if torch.compiler.is_compiling():
            grads, value = torch.func.grad_and_value(objective)(params)
            return grads, value
        value, parts = pull(weights, params, batch)
        return gathered(params, parts), value

    return gradient


def _make_pull(block_fn: BlockFunction, specs: Specs, loss: Loss, dtype: torch.dtype) -> Pull:
    """``(weights, params, batch) -> (loss, slices of the gradient)``, for steps that are not compiled."""

    def pull(weights: BlockWeights, params: Params, batch: Batch) -> tuple[Tensor, Iterator[Part]]:
        def objective(tuned: dict[str, Tensor]) -> Tensor:
            return loss(block_fn({**weights.frozen, **tuned}, batch.call), batch.target_BTD, batch.valid_BT)

        return pulled_back(objective, weights, params, specs, dtype)

    return pull


def make_update(optimizer: optim.Transform, specs: Specs, *, project: Projection = optim.project) -> Update:
    """Build ``(state, gradient, loss) -> state``: best-so-far bookkeeping, optimizer update, projection.

    The loss belongs to the parameters before the update, and so do the ``best_params`` it may select.

    Args:
        optimizer: any ``Transform`` over the parameters.
        specs: module path relative to the block -> how its weight is stored.
        project: (params, specs) -> params, puts them back where they may be after each update; some rows of a weight
            at a time where the optimizer allows it.

    >>> from autoround.func.rounding import prepare
    >>> from autoround.spec import QuantSpec
    >>> specs = {"0": QuantSpec(bits=2, group_size=2)}
    >>> prepared = prepare(torch.tensor([[1.0, -0.4]]), specs["0"])
    >>> params, optimizer = init_params({"0": prepared}), optim.signsgd(optim.constant(0.2))
    >>> state = make_update(optimizer, specs)(init_state(params, optimizer), params, torch.tensor(3.0))
    >>> round(state.params["0"].clip_max_OG.item(), 2), state.best_loss.item(), state.step.item()
    (0.8, 3.0, 1)
    """

    whole = _make_whole_update(optimizer, specs, project)

    def update(state: TuneState, grads: Params, value: Tensor) -> TuneState:
        if not _in_slices(optimizer, state):
            return whole(state, grads, value)
        parts = ((path, rows, rows_of(own, rows)) for path, own in grads.items() for rows in slices(own))
        return updated(whole, state, parts, value)

    return update


def _make_whole_update(optimizer: optim.Transform, specs: Specs, project: Projection) -> Update:
    """``make_update`` of all rows at once."""
    by_path = optim.by_path(optimizer)

    def update(state: TuneState, grads: Params, value: Tensor) -> TuneState:
        def better(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(improved.to(old.device), new, old)

        value = value.to(state.best_loss.device)
        improved, best_params = value < state.best_loss, state.best_params
        if best_params:
            best_params = tree_map(better, state.params, best_params)
        updates, opt_state = by_path.update(grads, state.opt_state, state.params)
        params = project(optim.apply_updates(state.params, updates), specs)
        return TuneState(params, opt_state, best_params, torch.minimum(value, state.best_loss), state.step + 1)

    return update


def _in_slices(optimizer: optim.Transform, state: TuneState) -> bool:
    """Whether an update goes through the rows of weights; a compiler does so itself."""
    return not torch.compiler.is_compiling() and optimizer.alone and bool(state.params)


def make_step(
    block_fn: BlockFunction,
    specs: Specs,
    optimizer: optim.Transform,
    *,
    loss: Loss = mse,
    dtype: torch.dtype = torch.float32,
    project: Projection = optim.project,
) -> Step:
    """Build ``(weights, state, batch) -> (state, loss)``, one traceable function for blocks of equal signature.

    Weights are arguments, so ``torch.compile(step, fullgraph=True, dynamic=False)`` compiles once for all of them.

    Args:
        block_fn: the lifted block.
        specs: module path relative to the block -> how its weight is stored.
        optimizer: for example ``signsgd(linear_decay(1 / iters, iters))``.
        loss: (output_BTD, target_BTD, valid_BT) -> 0-d tensor.
        dtype: in which the block computes.
        project: (params, specs) -> params after each update, as in ``make_update``.

    >>> from autoround.spec import QuantSpec
    >>> from autoround.func.block import make_block_fn, split_weights
    >>> from autoround.func.types import Call
    >>> _ = torch.manual_seed(0)
    >>> block, specs = torch.nn.Sequential(torch.nn.Linear(8, 8)), {"0": QuantSpec(bits=2, group_size=8)}
    >>> weights, optimizer = split_weights(block, specs), optim.signsgd(optim.linear_decay(0.1, 10))
    >>> step = make_step(make_block_fn(block), specs, optimizer)
    >>> state = init_state(init_params(weights.tuned), optimizer)
    >>> x = torch.ones(1, 4, 8)
    >>> batch = Batch(Call((x,), {}), block(x).detach(), torch.ones(1, 4, dtype=torch.bool))
    >>> _, first = step(weights, state, batch)
    >>> for _ in range(10): state, value = step(weights, state, batch)
    >>> bool(value < first), int(state.step)
    (True, 10)
    """
    gradient, pull = make_gradient(block_fn, specs, loss=loss, dtype=dtype), _make_pull(block_fn, specs, loss, dtype)
    update = _make_whole_update(optimizer, specs, project)

    def step(weights: BlockWeights, state: TuneState, batch: Batch) -> tuple[TuneState, Tensor]:
        if _in_slices(optimizer, state):
            value, parts = pull(weights, state.params, batch)
            return updated(update, state, parts, value), value
        grads, value = gradient(weights, state.params, batch)
        return update(state, grads, value), value

    return step


def accumulate(
    gradients: Sequence[Gradient], update: Update, *, total: Total | None = None
) -> Callable[[Sequence[BlockWeights], TuneState, Sequence[Batch]], tuple[TuneState, Tensor]]:
    """A step over several micro-batches, weighted by their valid tokens, on one device or several.

    Parameters are sent to where the weights of each micro-batch lie, and gradients back to where their parameters do.
    They are summed in pairs, then pairs of pairs, so that the result does not depend on which device computed what.

    Args:
        gradients: for each micro-batch, from ``make_gradient``, compiled or not.
        update: from ``make_update``, compiled or not; runs on the device of the state.
        total: (part, how many parts, a tree like each part) -> ``sum_in_pairs`` of them all, for processes that compute
            some of them each; this one computes all when not given.

    Returns:
        (weights of each micro-batch, on its devices; state; micro-batches) -> (state, loss).

    >>> from autoround.spec import QuantSpec
    >>> from autoround.func.block import make_block_fn, split_weights
    >>> from autoround.func.types import Call
    >>> block, specs = torch.nn.Sequential(torch.nn.Linear(8, 8)), {"0": QuantSpec(bits=2, group_size=8)}
    >>> weights, optimizer = split_weights(block, specs), optim.signsgd(optim.constant(0.1))
    >>> x, valid = torch.ones(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    >>> batch = Batch(Call((x,), {}), block(x).detach(), valid)
    >>> parts = [Batch(Call((x[row],), {}), batch.target_BTD[row], valid[row]) for row in ([0], [1])]
    >>> gradient, state = make_gradient(make_block_fn(block), specs), init_state(init_params(weights.tuned), optimizer)
    >>> _, whole = make_step(make_block_fn(block), specs, optimizer)(weights, state, batch)
    >>> _, summed = accumulate([gradient] * 2, make_update(optimizer, specs))([weights] * 2, state, parts)
    >>> torch.allclose(whole, summed)
    True
    """

    def step(replicas: Sequence[BlockWeights], state: TuneState, batches: Sequence[Batch]) -> tuple[TuneState, Tensor]:
        home = state.step.device
        counts = [batch.valid_BT.sum().to(home) for batch in batches]
        valid = torch.stack(counts).sum()
        params = {id(weights): _beside(state.params, weights) for weights in replicas}

        def part(index: int) -> tuple[Params, Tensor]:
            weights, share = replicas[index], counts[index] / valid
            own = gradients[index](weights, params[id(weights)], batches[index])
            found: tuple[Params, Tensor] = tree_map(lambda leaf: leaf * share.to(leaf.device), own)
            return found

        like = (state.params, state.best_loss)
        found = sum_in_pairs(part, 0, len(batches)) if total is None else total(part, len(batches), like)
        grads, value = tree_map(lambda leaf, own: leaf.to(own.device), found, like)
        return update(state, grads, value), value

    return step


def sum_in_pairs(part: Callable[[int], Any], first: int, last: int, known: Mapping[Span, Any] = _NOTHING) -> Any:
    """The sum of trees of tensors, halves added to halves, on the device of the first one.

    Args:
        part: index -> tree.
        first: of the parts.
        last: the one after the last.
        known: (first, last) -> their sum, where that is known already; such parts are not asked for.

    >>> parts = [torch.tensor(float(index)) for index in range(4)]
    >>> sum_in_pairs(parts.__getitem__, 0, 4), sum_in_pairs(parts.__getitem__, 0, 4, {(2, 4): torch.tensor(7.0)})
    (tensor(6.), tensor(8.))
    """
    if (first, last) in known:
        return known[first, last]
    if last - first == 1:
        return part(first)
    middle = (first + last + 1) // 2
    left, right = sum_in_pairs(part, first, middle, known), sum_in_pairs(part, middle, last, known)
    return tree_map(lambda mine, other: mine + other.to(mine.device), left, right)


def owned_spans(owners: Sequence[int]) -> dict[Span, int]:
    """The largest sums within ``sum_in_pairs`` that one owner can compute alone: (first, last) -> owner.

    Args:
        owners: of each part.

    >>> owned_spans([0, 0, 1, 1]), owned_spans([0, 0, 0, 1])
    ({(0, 2): 0, (2, 4): 1}, {(0, 2): 0, (2, 3): 0, (3, 4): 1})
    """

    def within(first: int, last: int) -> dict[Span, int]:
        if len(set(owners[first:last])) == 1:
            return {(first, last): owners[first]}
        middle = (first + last + 1) // 2
        return within(first, middle) | within(middle, last)

    return within(0, len(owners))


def _beside(params: Params, weights: BlockWeights) -> Params:
    """Parameters on the devices of the weights that they belong to."""
    places = {path: prepared.weight_OGS.device for path, prepared in weights.tuned.items()}
    return {path: RoundingParams(*(leaf.to(places[path]) for leaf in own)) for path, own in params.items()}
