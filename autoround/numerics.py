"""How a run computes: the backend's choices, made once and kept with the journal."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from autoround.backends.base import Backend, Numerics
from autoround.log import LOGGER
from autoround.plan import Plan
from autoround.recipe import Recipe
from autoround.spec import GgufSpec

# Weights from which on compiling their search takes less time than it saves, as measured on two cores.
COMPILE_SEARCHED = 100_000_000


def choose_numerics(
    recipe: Recipe, plan: Plan, backend: Backend, devices: int, recorded: Mapping[str, Any]
) -> Numerics:
    """The backend's choices, or those recorded by the run that this one continues.

    Experts are multiplied with torch's grouped product, which compiles in bfloat16 only: in other dtypes blocks of a
    mixture of experts run uncompiled.

    Args:
        recipe: the settings.
        plan: the fate of every layer.
        backend: of the devices.
        devices: how many there are; the micro-batches of a step are shared out evenly among them.
        recorded: names of choices that are made already -> their values, the attention among them.
    """
    rows = recipe.batch_size * recipe.gradient_accumulate_steps
    steps = recipe.iters * rows * recipe.seqlen
    compiled = recipe.torch_compile
    if compiled is None:
        compiled = backend.compile_helps(steps * len(plan.blocks)) or _searched(recipe, plan) >= COMPILE_SEARCHED
    dtype = backend.compute_dtype()
    if any(layer.shape.experts for layer in plan.layers.values()) and dtype != torch.bfloat16:
        if recipe.torch_compile:
            LOGGER.warning("torch_compile: experts are not compiled in %s; needed bfloat16; runs uncompiled", dtype)
        compiled = False
    chosen = Numerics(
        device=backend.name,
        dtype=str(dtype).removeprefix("torch."),
        attention=recorded["attention"],
        compiler=backend.compiler if compiled and (recipe.iters > 0 or recipe.searches_clips) else None,
        threads=torch.get_num_threads(),
        micro_batches=min(math.lcm(recipe.gradient_accumulate_steps, devices), rows, recipe.nsamples),
    )
    return dataclasses.replace(chosen, **{**recorded, "device": chosen.device})


def _searched(recipe: Recipe, plan: Plan) -> int:
    """Weights whose clips are searched, those of GGUF blocks thrice: so much more is tried for them."""
    if not recipe.searches_clips:
        return 0
    layers = [layer for layer in plan.layers.values() if layer.spec is not None]
    weights = sum(layer.shape.out_features * layer.shape.in_features for layer in layers)
    return weights * (3 if isinstance(plan.spec, GgufSpec) else 1)
