"""Some rows of a block's weights at a time: what a step makes on its way is then small, and stays in a CPU's cache.

Rounding knows groups only, the block knows weights only: the gradient reaches the weights first, whole, and from there
the parameters of one slice after another, whose values are computed once more on the way back instead of kept.

Legend: O rows of a weight, its output features or what ``fuse`` made of them, I columns, G groups in a row, S columns
in a group.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from autoround.func.rounding import fake_quantize
from autoround.func.types import BlockWeights, Params, Prepared, RoundingParams, TuneState
from autoround.spec import WeightSpec

Objective: TypeAlias = Callable[[dict[str, Tensor]], Tensor]
Part: TypeAlias = tuple[str, slice, RoundingParams]

# Weights in a slice: as much as a CPU's cache holds of all that is made of them; each kernel of another device takes
# longer to start than such a slice takes.
CPU_WEIGHTS, WEIGHTS = 2**18, 2**24
# Slices of a weight, at most.
MOST = 128
# ``Tensor.copy_``, but for tensors without data, for whose devices it asks.
_copy = torch.ops.aten.copy_.default


def slices(own: RoundingParams | Prepared) -> Iterator[slice]:
    """Rows that are taken together.

    >>> list(slices(RoundingParams(torch.zeros(3, 2**10, 2**7), torch.zeros(3, 2**10), torch.zeros(3, 2**10))))
    [slice(0, 2, None), slice(2, 3, None)]
    """
    rows, weights = len(own[0]), own[0].numel()
    size = max(CPU_WEIGHTS if own[0].device.type == "cpu" else WEIGHTS, weights // MOST)
    count = max(1, size * rows // max(weights, 1))
    return (slice(first, min(first + count, rows)) for first in range(0, rows, count))


def pulled_back(
    objective: Objective, weights: BlockWeights, params: Params, specs: Mapping[str, WeightSpec], dtype: torch.dtype
) -> tuple[Tensor, Iterator[Part]]:
    """A loss and its gradient, slice after slice: (path, rows, gradient of these rows).

    Args:
        objective: weights by name, (O, I) in the compute dtype -> loss.
        weights: of the block.
        params: of all its tuned weights.
        specs: how they are stored.
        dtype: in which the block computes.

    >>> from autoround.func.rounding import nearest, prepare
    >>> from autoround.spec import QuantSpec
    >>> specs = {"up": QuantSpec(bits=2, group_size=2)}
    >>> weights = BlockWeights({"up": prepare(torch.tensor([[-2.0, 0.9]]), specs["up"])}, {})
    >>> params = {"up": nearest(weights.tuned["up"])}
    >>> loss, parts = pulled_back(lambda own: own["up.weight"].sum(), weights, params, specs, torch.float32)
    >>> loss.item(), [(path, rows, grads.offset_OGS.tolist()) for path, rows, grads in parts]
    (-1.0, [('up', slice(0, 1, None), [[[1.0, 1.0]]])])
    """
    value, found = _weight_gradients(objective, weights, params, specs, dtype)

    def parts() -> Iterator[Part]:
        for path, prepared in weights.tuned.items():
            grad_OI = found.pop(path)
            for rows in slices(prepared):
                with torch.enable_grad():
                    own = tree_map(lambda leaf: leaf.detach().requires_grad_(), rows_of(params[path], rows))
                    weight_OI = fake_quantize(rows_of(prepared, rows), own, specs[path]).to(dtype)
                    grads = torch.autograd.grad(
                        weight_OI, own, grad_OI[rows], allow_unused=True, materialize_grads=True
                    )
                yield path, rows, RoundingParams(*grads)

    return value, parts()


def gathered(params: Params, parts: Iterable[Part]) -> Params:
    """Slices put together to trees like the parameters.

    >>> params = {"up": RoundingParams(torch.ones(2, 1, 1), torch.ones(2, 1), torch.ones(2, 1))}
    >>> gathered(params, [("up", slice(0, 2), params["up"])])["up"].clip_min_OG.tolist()
    [[1.0], [1.0]]
    """
    found = tree_map(torch.empty_like, params)
    for path, rows, own in parts:
        tree_map(_copy, rows_of(found[path], rows), own)
    return found  # type: ignore[no-any-return]


def updated(
    update: Callable[[TuneState, Params, Tensor], TuneState], state: TuneState, parts: Iterable[Part], value: Tensor
) -> TuneState:
    """The state after an update of every slice by itself.

    Args:
        update: (state, gradient, loss) -> state, which treats every row alike and by itself.
        state: its ``opt_state`` has the paths of the parameters.
        parts: (path, rows, gradient of these rows), all rows of all paths; there is one at least.
        value: the loss.

    >>> def update(state, grads, value):
    ...     return state._replace(params=grads, best_loss=value)
    >>> own = RoundingParams(torch.zeros(1, 1, 1), torch.ones(1, 1), torch.ones(1, 1))
    >>> state = TuneState({"up": own}, {"up": ()}, {}, torch.tensor(torch.inf), torch.tensor(0))
    >>> after = updated(update, state, [("up", slice(0, 1), own)], torch.tensor(3.0))
    >>> after.params["up"].clip_min_OG.tolist(), after.best_loss.item()
    ([[1.0]], 3.0)
    """
    found: TuneState = tree_map(torch.empty_like, state)
    for path, rows, grads in parts:
        part = update(_part(state, path, rows), {path: grads}, value)
        tree_map(_copy, _part(found, path, rows), part)
    return found


def rows_of(tree: Any, rows: slice) -> Any:
    """Views of some rows of every tensor; numbers, which count for all rows, as they are.

    >>> rows_of((torch.arange(4), torch.tensor(7)), slice(1, 3))
    (tensor([1, 2]), tensor(7))
    """
    size = rows.stop - rows.start
    return tree_map(lambda leaf: leaf.narrow(0, rows.start, size) if leaf.ndim else leaf, tree)


def _part(state: TuneState, path: str, rows: slice) -> TuneState:
    """The state of some rows of one weight."""
    params, opt_state, best_params = ({path: rows_of(tree[path], rows)} if tree else {} for tree in state[:3])
    return state._replace(params=params, opt_state=opt_state, best_params=best_params)


def _weight_gradients(
    objective: Objective, weights: BlockWeights, params: Params, specs: Mapping[str, WeightSpec], dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and its gradient for the rounded weights (O, I): path -> gradient, in the compute dtype."""
    tensors = {path: _rounded(own, params[path], specs[path], dtype) for path, own in weights.tuned.items()}
    with torch.enable_grad():  # which takes blocks with an autograd.Function of their own too
        value = objective({f"{path}.weight": tensor.requires_grad_() for path, tensor in tensors.items()})
        found = torch.autograd.grad(value, list(tensors.values()), allow_unused=True, materialize_grads=True)
    return value.detach(), dict(zip(tensors, found, strict=True))


def _rounded(prepared: Prepared, params: RoundingParams, spec: WeightSpec, dtype: torch.dtype) -> Tensor:
    """The fake-quantized weight (O, I) in the compute dtype."""
    weight_OI = torch.empty_like(prepared.weight_OGS.flatten(1), dtype=dtype)
    with torch.no_grad():
        for rows in slices(prepared):
            _copy(rows_of(weight_OI, rows), fake_quantize(rows_of(prepared, rows), rows_of(params, rows), spec))
    return weight_OI
