"""Formats that share a grid share a run: what a command asks for is split into recipes of one grid each. Torch-free."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from autoround.errors import UsageError
from autoround.formats.registry import resolve_name, rules
from autoround.recipe import Recipe

# What a GGUF file type decides by itself, and what it is where nothing is said.
_DECIDED: dict[str, Any] = {
    "scheme": "W4A16",
    "bits": None,
    "group_size": None,
    "sym": None,
    "scale_dtype": "float16",
    "layer_config": (),
    "ignore_layers": (),
    "quant_lm_head": False,
    "quant_nontext_module": False,
}


def split(recipe: Recipe) -> tuple[Recipe, ...]:
    """One recipe for all layouts of integer codes, and one for each GGUF file type, which has grids of its own.

    Several recipes write to subfolders named after their formats; the format ``fake`` goes with the first recipe.

    Raises:
        UsageError: no such format; or settings of the integer grid where only GGUF files are asked for.

    >>> [each.format for each in split(Recipe(format=("auto_gptq", "gguf:q4_k_m", "auto_awq")))]
    [('auto_gptq', 'auto_awq'), ('gguf:q4_k_m',)]
    """
    names = tuple(map(resolve_name, recipe.format))
    files = tuple(dict.fromkeys(name for name in names if rules(name).file_type))
    others = tuple(name for name in names if name not in files)
    if not files:
        return (recipe,)
    integer = [name for name in others if not rules(name).any_grid]
    if not integer:
        _refuse_decided(recipe, files[0])
        families = [(files[0], *others), *((name,) for name in files[1:])]
    else:
        families = [others, *((name,) for name in files)]
    if len(families) == 1:
        return (replace(recipe, format=families[0]),)
    return tuple(_own(recipe, family) for family in families)


def _own(recipe: Recipe, family: tuple[str, ...]) -> Recipe:
    """The recipe of one family of several: a single format has its subfolder, more of them share the folder."""
    folder = recipe.output_dir if len(family) > 1 else str(Path(recipe.output_dir) / family[0].replace(":", "_"))
    if any(rules(name).file_type for name in family):
        return replace(recipe, format=family, output_dir=folder, **_DECIDED)
    return replace(recipe, format=family, output_dir=folder)


def _refuse_decided(recipe: Recipe, file_type: str) -> None:
    for name, unset in _DECIDED.items():
        if getattr(recipe, name) != unset:
            raise UsageError(
                f"format {file_type}: found --{name}; needed none: the file type gives every tensor its type; "
                "leave it out or use another file type"
            )
