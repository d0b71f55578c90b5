"""What happens in which step: the rows of its batch and the optimizer's rates, functions of the recipe."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from autoround import func
from autoround.recipe import Recipe

# Learning rate of factors of scales, for a grid of one level, and the steps that reach it.
SCALE_RATE, WARM_STEPS = 0.04, 4


def make_optimizer(recipe: Recipe, specs: Mapping[str, func.WeightSpec]) -> func.Transform:
    """The recipe's optimizer: SignSGD or AdamW, for each weight with the learning rates of its bits."""
    return func.each_path({path: _optimizer(recipe, spec.bits) for path, spec in specs.items()})


def _optimizer(recipe: Recipe, bits: int) -> func.Transform:
    """Offsets and clips have learning rates of their own."""
    rate, steps = recipe.learning_rate(bits), max(recipe.iters, 1)
    family = func.adamw if recipe.adam else partial(func.signsgd, momentum=recipe.momentum)
    schedules = {"offset": func.linear_decay(rate, steps), "clip": func.linear_decay(recipe.minmax_lr or rate, steps)}
    return func.partition({field: family(schedule) for field, schedule in schedules.items()}, func.by_field)


def scale_optimizer(steps: int, bits: int) -> func.Transform:
    """Adam on factors of scales: the coarser the grid, the farther they go."""
    rate = func.warm_up(func.linear_decay(SCALE_RATE / 2**bits, steps), min(WARM_STEPS, steps // 4))
    return func.adamw(rate, beta2=0.95)


def batch_rows(seed: int, block: int, rows: int, batch_size: int, steps: int) -> Iterator[Tensor]:
    """Rows of each step's batch, a pure function of (seed, block, step): epochs of shuffled rows, whole batches only.

    Args:
        rows: how many there are; fewer than ``batch_size`` make one smaller batch.

    >>> whole = [batch.tolist() for batch in batch_rows(0, 0, rows=4, batch_size=2, steps=3)]
    >>> [batch.tolist() for batch in batch_rows(0, 0, rows=4, batch_size=2, steps=2)] == whole[:2]
    True
    >>> sorted(whole[0] + whole[1])
    [0, 1, 2, 3]
    """
    per_epoch = max(rows // batch_size, 1)
    order_N = torch.empty(0)
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            generator = torch.Generator().manual_seed(((seed * 1_000_003 + block) * 1_000_003 + epoch) % 2**63)
            order_N = torch.randperm(rows, generator=generator)
        yield order_N[place * batch_size : (place + 1) * batch_size]
