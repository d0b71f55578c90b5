"""How a run computes: the backend's choices, made once and kept with the journal."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from autoround.backends.base import Backend, Numerics
from autoround.errors import UsageError
from autoround.log import LOGGER
from autoround.plan import Plan
from autoround.recipe import Recipe
from autoround.spec import GgufSpec

# Weights from which on compiling their search takes less time than it saves, as measured on two cores.
COMPILE_SEARCHED = 100_000_000
# What errors of torch's allocators and libraries say that have no type of their own.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


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
        devices: how many there are, or parts that processes can share; the micro-batches of a step are shared out
            evenly among them.
        recorded: names of choices that are made already -> their values, the attention among them.

    Raises:
        UsageError: compiling is asked for, or was recorded, where it cannot be done; or is asked for otherwise than
            recorded.
    """
    rows = recipe.batch_size * recipe.gradient_accumulate_steps
    steps = recipe.iters * rows * recipe.seqlen
    compiled = recipe.torch_compile
    if compiled is None:
        helps = backend.compile_helps(steps * len(plan.blocks)) or _searched(recipe, plan) >= COMPILE_SEARCHED
        compiled = helps and not backend.lacks()
    learns = recipe.iters > 0 or recipe.searches_clips or recipe.scale_steps > 0
    dtype = backend.compute_dtype()
    if any(layer.shape.experts for layer in plan.layers.values()) and dtype != torch.bfloat16:
        if recipe.torch_compile:
            LOGGER.warning("torch_compile: experts are not compiled in %s; needed bfloat16; runs uncompiled", dtype)
        compiled = False
    chosen = Numerics(
        device=backend.name,
        dtype=str(dtype).removeprefix("torch."),
        attention=recorded["attention"],
        compiler=backend.compiler if compiled and learns else None,
        threads=torch.get_num_threads(),
        micro_batches=min(math.lcm(recipe.gradient_accumulate_steps, devices), rows, recipe.nsamples),
    )
    made = dataclasses.replace(chosen, **{**recorded, "device": chosen.device})
    _check_compiler(made, chosen, recipe, backend)
    return made


def _check_compiler(made: Numerics, chosen: Numerics, recipe: Recipe, backend: Backend) -> None:
    if made.compiler != chosen.compiler and recipe.torch_compile is (chosen.compiler is not None):
        was, now = ("not compiled", "on") if chosen.compiler else ("compiled", "off")
        raise UsageError(
            f"torch_compile: found it {now} for a run whose blocks so far are {was}; needed the same for all; leave it "
            "out, or begin anew with --restart"
        )
    if made.compiler and (missing := backend.lacks()):
        raise UsageError(f"torch_compile: found no compiler; needed {missing}; install it, or --disable_torch_compile")


def divided(numerics: Numerics, recipe: Recipe) -> Numerics | None:
    """The same with steps in twice as many parts; None where there are no steps, or each part has one row already.

    The rows of a step stay the same and parts are added in pairs, but each part is computed in one piece: a run that
    is divided finer gives other bits than one that is not, and the same as one that was so from its begin.
    """
    rows = min(recipe.batch_size * recipe.gradient_accumulate_steps, recipe.nsamples)
    if not recipe.iters or numerics.micro_batches >= rows:
        return None
    return dataclasses.replace(numerics, micro_batches=min(2 * numerics.micro_batches, rows))


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory, a device's or the host's, does not suffice.

    >>> ran_out(torch.OutOfMemoryError("CUDA out of memory")), ran_out(RuntimeError("shapes do not match"))
    (True, False)
    """
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(each in words for each in OUT_OF_MEMORY)
    )


def _searched(recipe: Recipe, plan: Plan) -> int:
    """Weights whose clips are searched, those of GGUF blocks thrice: so much more is tried for them."""
    if not recipe.searches_clips:
        return 0
    layers = [layer for layer in plan.layers.values() if layer.spec is not None]
    weights = sum(layer.shape.out_features * layer.shape.in_features for layer in layers)
    return weights * (3 if isinstance(plan.spec, GgufSpec) else 1)
