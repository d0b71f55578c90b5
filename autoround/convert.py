"""Opening a quantized checkpoint, of this package or another one, so that its codes can be written in other layouts."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from autoround.errors import FormatError, ModelError
from autoround.formats.stored import Stored, stored
from autoround.func.types import IntCodes
from autoround.model.blocks import structure
from autoround.model.load import CONFIG, OpenModel, folder_config
from autoround.model.names import match_names
from autoround.model.skeleton import build_skeleton
from autoround.model.source import read_headers, read_tensor
from autoround.plan import Plan, recorded
from autoround.spec import QuantSpec


class PackedSource:
    """The tensors of a quantized checkpoint: a ``WeightSource`` of those that are not packed, and the packed layers.

    Weights of packed layers have names here, and no values.

    Raises:
        ModelError: missing or damaged files, or tensors that are not the model's.
    """

    def __init__(self, folder: Path, skeleton: PreTrainedModel, layout: Stored) -> None:
        self._where = str(folder)
        self._files, self._heads = read_headers(folder)
        self._packed = layout.layers(self._heads)
        taken = {f"{layer}.{kind}" for layer, kinds in self._packed.items() for kind in kinds}
        floats = [key for key in self._heads if key not in taken]
        weights = [f"{layer}.weight" for layer in self._packed]
        self._keys = match_names(skeleton, [*floats, *weights], self._where)
        self._names = tuple(name for name, key in self._keys.items() if key in self._heads)
        self.layers = {name.removesuffix(".weight"): key.removesuffix(".weight")
                       for name, key in self._keys.items() if key not in self._heads}  # fmt: skip

    def names(self) -> tuple[str, ...]:
        return self._names

    def checkpoint_name(self, name: str) -> str:
        if name not in self._keys:
            raise ModelError(f"{self._where}: found no tensor {name}; needed all parameters; download it again")
        return self._keys[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._heads[self.checkpoint_name(name)].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of a packed weight: that of the other weights."""
        key = self.checkpoint_name(name)
        if key in self._heads:
            return self._heads[key].dtype
        return next((head.dtype for head in map(self._heads.get, map(self._keys.get, self._names))
                     if head is not None and head.is_floating_point()), torch.float16)  # fmt: skip

    def read(self, name: str) -> Tensor:
        key = self.checkpoint_name(name)
        return read_tensor(self._files[key], key)

    def zero_points(self, path: str) -> dict[str, Tensor]:
        """The tensors with zero points of a packed layer by their last names."""
        layer = self.layers[path]
        keys = {kind: f"{layer}.{kind}" for kind in self._packed[layer] if "zero" in kind}
        return {kind: read_tensor(self._files[key], key) for kind, key in keys.items()}

    def packed(self, path: str, *, data: bool = True) -> dict[str, Tensor]:
        """The tensors of a packed layer by their last names."""
        layer = self.layers[path]
        if not data:
            return self._packed[layer]
        keys = {kind: f"{layer}.{kind}" for kind in self._packed[layer]}
        return {kind: read_tensor(self._files[key], key) for kind, key in keys.items()}


@dataclass(frozen=True, kw_only=True)
class QuantizedModel:
    """A quantized checkpoint that is opened, not loaded.

    Attributes:
        model: its modules, configuration and unquantized tensors.
        plan: which layers are quantized, and how.
        source: its tensors.
        layout: how the packed ones hold codes.
    """

    model: OpenModel
    plan: Plan
    source: PackedSource
    layout: Stored

    def read_block(self, index: int) -> dict[str, IntCodes]:
        """Codes of the layers of a part of the plan by path relative to it.

        Raises:
            FormatError: the columns of a layer are not in order; names it.
        """
        part, codes = self.plan.parts[index], {}
        for relative, spec in part.specs.items():
            path = f"{part.prefix}{relative}"
            try:
                codes[relative] = self.layout.codes(self.source.packed(path), spec)
            except FormatError as error:
                raise FormatError(f"{path}: {error}") from error
        return codes


def open_quantized(folder: Path, *, trust_remote_code: bool = False) -> QuantizedModel:
    """Open a quantized checkpoint; no weight is loaded.

    Args:
        folder: with config.json and safetensors.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ModelError: missing or damaged files, or an unsupported architecture.
        FormatError: a layout that this package does not read.
    """
    quantization = _settings(folder).get("quantization_config")
    if not quantization:
        raise ModelError(f"{folder}: found no quantization_config in {CONFIG}; needed a quantized checkpoint")
    layout = stored(quantization, str(folder))
    config = folder_config(folder, trust_remote_code=trust_remote_code, quantized=True)
    skeleton = build_skeleton(config, str(folder), trust_remote_code=trust_remote_code)
    source = PackedSource(folder, skeleton, layout)
    shape = structure(skeleton)
    layers = {layer.path: layer for block in shape.blocks for layer in block.layers}
    layers |= {layer.path: layer for layer in shape.outside}
    specs = {}
    for path in source.layers:
        if path not in layers:
            raise FormatError(f"{folder}: found packed tensors of {path}; needed those of linear layers")
        spec = layout.spec(source.packed(path, data=False), layers[path].in_features, path)
        specs[path] = replace(spec, sym=layout.is_symmetric(source.zero_points(path), spec))
    if not specs:
        raise FormatError(f"{folder}: found no packed layers; needed tensors named {', '.join(layout.needed)}")
    model = OpenModel(
        name=str(folder), skeleton=skeleton, config=config, source=source, folder=folder,
        trust_remote_code=trust_remote_code)  # fmt: skip
    plan = recorded(shape, _most_common(specs.values()), specs)
    return QuantizedModel(model=model, plan=plan, source=source, layout=layout)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return {}
    return settings


def _most_common(specs: Iterable[QuantSpec]) -> QuantSpec:
    return Counter(specs).most_common(1)[0][0]
