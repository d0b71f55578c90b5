"""What a run is: everything that decides its codes, as the journal's manifest keeps and compares it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from autoround import __version__
from autoround.backends.base import Numerics
from autoround.data.tokens import Calibration
from autoround.journal import ORIGIN
from autoround.model.source import WeightSource
from autoround.plan import Plan
from autoround.recipe import Recipe
from autoround.sealed import digest

# Settings that decide no code by themselves: what they stand for is in the manifest in another form, or nothing is.
FREE_SETTINGS = frozenset({
    "model", "revision", "cache_dir", "token", "trust_remote_code", "dataset", "format", "output_dir", "overwrite",
    "restart", "max_shard_size", "model_dtype", "device_map", "low_gpu_mem_usage", "torch_compile", "layer_config",
    "ignore_layers", "quant_lm_head", "quant_nontext_module", "activations", "scale_steps",
})  # fmt: skip
# Raised whenever the same settings give other codes than before: a run then goes on with the version that began it.
METHOD = "2"
# What may differ between the ranks of a run: how each of them reaches a hub.
_OF_A_RANK = frozenset({"token", "cache_dir"})


def shared_facts(recipe: Recipe, numerics: Numerics) -> dict[str, Any]:
    """What all ranks of a run must have alike, by name; text that is given as data is the first rank's to know."""
    settings = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in _OF_A_RANK}
    if not isinstance(settings["dataset"], str):
        del settings["dataset"]
    return settings | {f"numerics.{name}": value for name, value in dataclasses.asdict(numerics).items()} | _versions()


def manifest_of(
    recipe: Recipe,
    plan: Plan,
    numerics: Numerics,
    *,
    source: WeightSource,
    calibration: Calibration | None,
    origin: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Describe a run; all weights are read and hashed.

    Args:
        recipe: the settings.
        plan: the fate of every layer.
        numerics: how it computes.
        source: the float weights.
        calibration: its text; None where nothing is learned from data.
        origin: where the model came from; it decides nothing.
    """
    settings = dataclasses.asdict(recipe)
    return {
        "recipe": {name: value for name, value in settings.items() if name not in FREE_SETTINGS}
        | {"clip_search": recipe.searches_clips, "compensate": recipe.compensates},
        ORIGIN: origin,
        "spec": dataclasses.asdict(plan.spec),
        "plan": {path: dataclasses.asdict(spec) for path, spec in plan.specs.items()},
        "source_sha256": digest((name, source.read(name)) for name in sorted(source.names())),
        "calibration_sha256": digest(iter(()) if calibration is None else calibration.tensors()),
        "versions": _versions(),
        "numerics": dataclasses.asdict(numerics),
    }


def _versions() -> dict[str, str]:
    return {
        "autoround": __version__,
        "method": METHOD,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
