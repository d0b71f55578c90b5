"""GGUF files as sources: mapped into memory and dequantized tensor by tensor."""

import struct
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from gguf.gguf_reader import GGUFReader, ReaderTensor
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from autoround.errors import ModelError
from autoround.model.gguf_rope import add_scaled_rope
from autoround.model.names import Pieces, written_names
from autoround.model.source import StoredNames

# What the names of stacks of experts have in them.
_STACK = "_exps."


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A GGUF file: its architecture by llama.cpp's name, and its tensors by name, mapped into memory.

    Attributes:
        rope: what its metadata says of rotary positions, by the names below ``ARCHITECTURE.rope.``.
    """

    path: Path
    architecture: str
    rope: dict[str, Any]
    tensors: dict[str, ReaderTensor]


def open_gguf(path: Path) -> GgufFile:
    """Map a GGUF file into memory.

    Raises:
        ModelError: no such file, or not a complete GGUF file.
    """
    if not path.is_file():
        raise ModelError(f"{path}: found no such file; needed a GGUF file; check the path")
    try:
        reader = GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
        below = f"{architecture}.rope."
        rope = {key.removeprefix(below): own.contents() for key, own in reader.fields.items() if key.startswith(below)}
    except (ValueError, IndexError, KeyError, struct.error, OSError) as error:
        raise ModelError(
            f"{path}: found a damaged or truncated file ({error}); needed a complete GGUF file; download it again"
        ) from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return GgufFile(path=path, architecture=architecture, rope=rope, tensors=tensors)


def read_config(file: GgufFile) -> PreTrainedConfig:
    """Configuration that transformers makes of a file's metadata, with scaled rotary positions, which it leaves out.

    Raises:
        ModelError: transformers does not know the architecture, or a configuration cannot say how positions are scaled.
    """
    try:
        settings, _ = PreTrainedConfig.get_config_dict(file.path.parent, gguf_file=file.path.name)
        config: PreTrainedConfig = AutoConfig.for_model(**settings)
    except (ValueError, KeyError) as error:
        raise _unknown(file, error) from error
    add_scaled_rope(config, file.rope, file.tensors, str(file.path))
    return config


class GgufSource(StoredNames):
    """The tensors of a GGUF file, read as float32 in the layout of the transformers module.

    Raises:
        ModelError: tensors are missing, or are laid out in a way that transformers cannot read.
    """

    def __init__(self, file: GgufFile, skeleton: PreTrainedModel) -> None:
        self._file = file
        self._written = written_names(skeleton)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        self._processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=skeleton.config.to_dict())
        try:
            names: dict[str, str] = get_gguf_hf_weights_map(skeleton, self._processor)
        except NotImplementedError as error:
            raise _unknown(file, error) from error
        stored = {key: names[known] for key in file.tensors if (known := _known_as(key)) in names}
        if lost := [key for key in file.tensors if _STACK in key and key not in stored]:
            raise ModelError(
                f"{file.path}: found {lost[0]} in a file of architecture {file.architecture}, whose experts "
                "transformers does not read from GGUF; needed another model, or its safetensors checkpoint"
            )
        # Gate projections come before up projections, as the module has the two in one stack.
        self._halves: dict[str, list[str]] = defaultdict(list)
        for key in sorted(stored):
            if _STACK in key:
                self._halves[stored[key]].append(key)
        super().__init__(skeleton, {name: key for key, name in stored.items()}, str(file.path))
        for name, halves in self._halves.items():
            columns, rows, experts = map(int, file.tensors[halves[0]].shape)
            if (experts, rows * len(halves), columns) != self._shapes[name]:
                raise ModelError(
                    f"{file.path}: found {halves[0]} of {experts} x {rows} x {columns}; needed {self._shapes[name]} "
                    f"for {name}, as transformers reads the sizes of experts; use the model's safetensors checkpoint"
                )

    def checkpoint_name(self, name: str) -> str:
        self.key(name)
        return self._written.single.get(name, name)

    def pieces(self, name: str) -> Pieces:
        self.key(name)
        return self._written.stacked.get(name, ())

    def shape(self, name: str) -> tuple[int, ...]:
        self.key(name)
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        self.key(name)
        return torch.float32

    def read(self, name: str) -> Tensor:
        key = self.key(name)
        if halves := self._halves.get(name):
            return torch.cat([torch.from_numpy(numpy.array(self._dequantized(each))) for each in halves], dim=1)
        weights = self._processor.process(weights=self._dequantized(key), name=key).weights
        return torch.from_numpy(numpy.array(weights))

    def _dequantized(self, key: str) -> numpy.ndarray:
        stored = self._file.tensors[key]
        try:
            return gguf.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise ModelError(
                f"{self._file.path}: {stored.name}: found type {stored.tensor_type.name}; needed one that the gguf "
                "package dequantizes; use a file of another quantization"
            ) from error


def _known_as(key: str) -> str:
    """A tensor's name as transformers spells it: those of experts are no modules there."""
    return key.removesuffix(".weight") if _STACK in key else key


def _unknown(file: GgufFile, error: Exception) -> ModelError:
    return ModelError(
        f"{file.path}: found architecture {file.architecture}, which transformers cannot read from GGUF ({error}); "
        "needed another model, or its safetensors checkpoint"
    )
