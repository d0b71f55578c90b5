"""The loop over steps."""

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from autoround.errors import ModelError
from autoround.func.types import Params, TuneState

# How many losses there is room for at first.
LOSSES = 256

W = TypeVar("W")
B = TypeVar("B")


class TuneResult(NamedTuple):
    """Outcome of tuning one block.

    Attributes:
        params: the last parameters, or those of the best step where the state carried them.
        losses_K: float32, loss of every step, each measured before its update.
    """

    params: Params
    losses_K: Tensor


def tune_block(
    step: Callable[[W, TuneState, B], tuple[TuneState, Tensor]],
    weights: W,
    state: TuneState,
    batches: Iterable[B],
    *,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> TuneResult:
    """Run a step over batches. No batches means no steps: the result is then the state's own parameters.

    Args:
        step: from ``make_step`` or ``accumulate``, compiled or not.
        weights: the block's tensors, as the step takes them.
        state: from ``init_state``; its ``best_params`` decide whether the best or the last parameters are returned.
        batches: one element per step.
        on_step: called with (steps done, 0-d loss); reading the loss waits for the device.

    Raises:
        ModelError: a loss is NaN or infinite.

    >>> def step(weights, state, batch):
    ...     return state._replace(params={"up": batch}), torch.tensor(float(batch))
    >>> state = TuneState({"up": 0}, (), {}, torch.tensor(torch.inf), torch.tensor(0))
    >>> result = tune_block(step, None, state, [3, 2, 1])
    >>> result.params, result.losses_K.tolist()
    ({'up': 1}, [3.0, 2.0, 1.0])
    """
    losses_K = torch.zeros(0)
    done = 0
    for done, batch in enumerate(batches, start=1):
        state, loss = step(weights, state, batch)
        if done > len(losses_K):
            losses_K = torch.cat([losses_K.to(loss), loss.new_zeros(max(done, LOSSES))])
        # copied: a step's own one, kept between its large tensors, would hold a megabyte of a CPU's heap open
        losses_K[done - 1] = loss
        if on_step is not None:
            on_step(done, losses_K[done - 1])
    losses_K = losses_K[:done]
    if not bool(torch.isfinite(losses_K).all()):
        first = int((~torch.isfinite(losses_K)).nonzero()[0])
        raise ModelError(
            f"loss: found {losses_K[first].item()} at step {first}; needed a finite one; check the weights and data"
        )
    return TuneResult(state.best_params or state.params, losses_K)
