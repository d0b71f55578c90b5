"""Opening a quantized checkpoint, of this package or another one, so that its codes can be written in other layouts."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from autoround.errors import FormatError, ModelError
from autoround.formats.stored import Stored, stored
from autoround.func.types import IntCodes
from autoround.model.experts import describe
from autoround.model.load import CONFIG, OpenModel, folder_config
from autoround.model.names import Pieces, match_names
from autoround.model.skeleton import build_skeleton
from autoround.model.source import read_headers, read_stack, stack_shape
from autoround.plan import Plan
from autoround.resolve import recorded
from autoround.spec import QuantSpec, WeightSpec
from autoround.tensor_files import read_tensor


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
        found = match_names(skeleton, [*floats, *weights], self._where)
        self._stacked, self._extra = found.stacked, found.extra
        self._keys = {**found.single, **{name: pieces[0][0] for name, pieces in self._stacked.items()}}
        self._names = tuple(name for name, key in self._keys.items() if key in self._heads)
        self._keys |= {key: key for key in self._extra}
        # Path of a packed layer -> names of its matrices in the checkpoint: one, or those of a stack of experts.
        self.layers = {}
        for name, key in self._keys.items():
            keys = [each for expert in self._stacked.get(name, ((key,),)) for each in expert]
            if packed := [each for each in keys if each not in self._heads]:
                if len(packed) != len(keys):
                    raise ModelError(
                        f"{self._where}: {name}: found only {packed[0]} packed; needed all experts or none"
                    )
                self.layers[name.removesuffix(".weight")] = tuple(each.removesuffix(".weight") for each in keys)

    def names(self) -> tuple[str, ...]:
        return self._names

    def extra(self) -> tuple[str, ...]:
        return self._extra

    def checkpoint_name(self, name: str) -> str:
        if name not in self._keys:
            raise ModelError(f"{self._where}: found no tensor {name}; needed all parameters; download it again")
        return self._keys[name]

    def pieces(self, name: str) -> Pieces:
        self.checkpoint_name(name)
        return self._stacked.get(name, ())

    def shape(self, name: str) -> tuple[int, ...]:
        if pieces := self.pieces(name):
            return stack_shape(self._heads, pieces, f"{self._where}: {name}")
        return tuple(self._heads[self.checkpoint_name(name)].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of a packed weight: that of the other weights."""
        key = self.checkpoint_name(name)
        if key in self._heads:
            return self._heads[key].dtype
        return next((head.dtype for head in map(self._heads.get, map(self._keys.get, self._names))
                     if head is not None and head.is_floating_point()), torch.float16)  # fmt: skip

    def read(self, name: str) -> Tensor:
        key, pieces = self.checkpoint_name(name), self.pieces(name)
        return read_stack(self._read_one, pieces, self.shape(name)) if pieces else self._read_one(key)

    def _read_one(self, key: str) -> Tensor:
        return read_tensor(self._files[key], key)

    def heads(self, path: str) -> list[dict[str, Tensor]]:
        """The tensors of a packed layer by their last names, without data, for each of its matrices."""
        return [self._packed[layer] for layer in self.layers[path]]

    def zero_points(self, path: str) -> list[dict[str, Tensor]]:
        """The same of tensors with zero points, with data."""
        return [self._read(layer, [kind for kind in self._packed[layer] if "zero" in kind])
                for layer in self.layers[path]]  # fmt: skip

    def matrices(self, path: str) -> Iterator[dict[str, Tensor]]:
        """The tensors of every matrix of a packed layer by their last names."""
        for layer in self.layers[path]:
            yield self._read(layer, self._packed[layer])

    def _read(self, layer: str, kinds: Iterable[str]) -> dict[str, Tensor]:
        keys = {kind: f"{layer}.{kind}" for kind in kinds}
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
        part = self.plan.parts[index]
        return {relative: self.codes(f"{part.prefix}{relative}", spec) for relative, spec in part.specs.items()}

    def codes(self, path: str, spec: WeightSpec) -> IntCodes:
        """Codes of a layer; those of all experts, one below the other, for a stack.

        Raises:
            FormatError: the columns are not in order; names the layer.
        """
        try:
            assert isinstance(spec, QuantSpec), "no folder of safetensors holds other codes"
            found = [self.layout.codes(tensors, spec) for tensors in self.source.matrices(path)]
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from error
        return found[0] if len(found) == 1 else IntCodes(*(torch.cat(fields) for fields in zip(*found, strict=True)))


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
    shape = describe(skeleton)
    layers = {layer.path: layer for block in shape.blocks for layer in block.layers}
    layers |= {layer.path: layer for layer in shape.outside}
    specs = {}
    for path in source.layers:
        if path not in layers:
            raise FormatError(f"{folder}: found packed tensors of {path}; needed those of linear layers")
        stored_as = {layout.spec(heads, layers[path].in_features, path) for heads in source.heads(path)}
        if len(stored_as) > 1:
            raise FormatError(f"{folder}: {path}: found experts of different bits or groups; needed equal ones")
        spec = stored_as.pop()
        symmetric = all(layout.is_symmetric(zeros, spec) for zeros in source.zero_points(path))
        specs[path] = replace(spec, sym=symmetric)
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
