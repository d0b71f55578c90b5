"""The plan of a GGUF file: every tensor gets the type that llama.cpp's quantizer would give it."""

from collections.abc import Mapping
from typing import Any

import torch

from autoround.errors import UsageError
from autoround.formats.gguf.architectures import check, stored_float, tensor_names
from autoround.formats.gguf.recipes import FILE_TYPES, tensor_types
from autoround.plan import BlockPlan, LayerPlan, LayerShape, Plan, Structure
from autoround.spec import GGUF_TYPES, GgufSpec


def plan_file(
    file_type: str, structure: Structure, embedding: LayerShape, config: Any, shapes: Mapping[str, tuple[int, ...]]
) -> Plan:
    """Decide the fate of every layer, the embedding included.

    Args:
        file_type: one of ``FILE_TYPES``.
        structure: the model.
        embedding: of its tokens, which is the output head as well where the model ties them.
        config: of the model.
        shapes: of its parameters by name.

    Raises:
        UsageError: an architecture that is not known here, or a setting that llama.cpp cannot be told.
    """
    check(config)
    types = stored_types(file_type, config, shapes)
    base = FILE_TYPES[file_type].base

    def fate(layer: LayerShape) -> LayerPlan:
        names = tensor_names(config, layer.parameter)
        if not names:
            return LayerPlan(shape=layer, spec=None, reason=f"tied to {layer.tied_to}")
        kind = types[names[0]]
        if kind in GGUF_TYPES:
            return LayerPlan(shape=layer, spec=GgufSpec(type=kind))
        if layer.fixed:
            return LayerPlan(shape=layer, spec=None, reason=f"{layer.fixed}: stored as {kind}")
        why = "" if base not in GGUF_TYPES else f": {layer.in_features} columns are no multiple of 32"
        return LayerPlan(shape=layer, spec=None, reason=f"stored as {kind}{why}")

    blocks = tuple(
        BlockPlan(path=block.path, layers=tuple(map(fate, block.layers)))
        for block in (structure.blocks if base in GGUF_TYPES else ())  # there is nothing to make codes of
    )
    most = base if base in GGUF_TYPES else "q8_0"
    return Plan(
        architecture=structure.architecture,
        spec=GgufSpec(type=most),
        blocks=blocks,
        outside=tuple(map(fate, (embedding, *structure.outside))),
    )


def check_types(plan: Plan, file_type: str, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse codes of other types than a file of this kind has.

    Raises:
        UsageError: names the layer.
    """
    types = stored_types(file_type, config, shapes)
    for path, layer in plan.layers.items():
        needed = [types[name] for name in tensor_names(config, layer.shape.parameter)]
        found = str(layer.spec).lower() if layer.spec else ""
        if needed and found != (needed[0] if needed[0] in GGUF_TYPES else ""):
            raise UsageError(
                f"format gguf:{file_type}: {path}: found {found or 'no'} codes; needed {needed[0]}; "
                "name the format when the run begins"
            )


def stored_types(file_type: str, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Name in the file -> type, for every tensor of the model.

    Args:
        file_type: one of ``FILE_TYPES``.
        config: of the model.
        shapes: of its parameters by name.
    """
    stored: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        parts = stored_float(config, name, torch.empty(shape, device="meta"))
        stored.update(zip(tensor_names(config, name), (tuple(part.shape) for part in parts), strict=True))
    return tensor_types(
        file_type,
        stored,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        experts=getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0,
    )
