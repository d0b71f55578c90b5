"""A model as a GGUF file: codes and kept tensors under llama.cpp's names, written and read back.

Legend: O output features, I input features.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoround.errors import FormatError
from autoround.formats.contents import PIECE, BlockCodes, Model, pieces
from autoround.formats.gguf.architectures import row_order, stored_float, tensor_names
from autoround.formats.gguf.blocks import pack_blocks, unpack_blocks
from autoround.formats.gguf.container import (
    FLOATS,
    GgufTensor,
    Value,
    copied_metadata,
    data_bytes,
    file_bytes,
    quantization_metadata,
    read_tensors,
    write_gguf,
)
from autoround.formats.gguf.metadata import extra_tensors, metadata
from autoround.formats.gguf.plan import check_types, stored_types
from autoround.formats.gguf.recipes import FILE_TYPES
from autoround.formats.gguf.tokenizer import tokenizer_metadata
from autoround.func.types import AsymBlockCodes, SymBlockCodes
from autoround.plan import LayerShape, Plan
from autoround.spec import GgufSpec

_ADVICE = "export it again"


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    """Name of every tensor -> its shape; the embedding among them where a checkpoint names what is tied by the head."""
    embedding = model.skeleton.get_input_embeddings()
    path = next(path for path, module in model.skeleton.named_modules() if module is embedding)
    return {name: model.source.shape(name) for name in dict.fromkeys([*model.source.names(), f"{path}.weight"])}


class _Layer(NamedTuple):
    """A quantized layer: its name in the file, shape, spec, and its codes with rows in the order of the file."""

    name: str
    shape: tuple[int, ...]
    spec: GgufSpec
    codes: Callable[[], SymBlockCodes | AsymBlockCodes]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """What is in a file.

    Attributes:
        file_type: one of ``FILE_TYPES``.
        model: where the unquantized tensors, the configuration and the tokenizer come from.
        plan: which layers are quantized, and as what.
        codes: number of a part of the plan -> codes of its layers.
    """

    file_type: str
    model: Model
    plan: Plan
    codes: BlockCodes

    @property
    def name(self) -> str:
        """Of the file, by llama.cpp's custom: that of the model, then the types of its tensors."""
        return f"{_plain_name(self.model)}-{self.file_type.upper()}.gguf"

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return data_bytes(self.tensors())

    def weight_files(self) -> dict[str, int]:
        """The file that ``write`` would write: name -> bytes; codes are not asked for."""
        return {self.name: file_bytes(self.metadata(), self.tensors())}

    def check(self) -> None:
        """Refuse a plan of other types than this kind of file has.

        Raises:
            UsageError: names the layer.
        """
        check_types(self.plan, self.file_type, self.model.config, shapes_of(self.model))

    def tensors(self) -> list[GgufTensor]:
        """Everything that is written, in the order of the file: kept tensors first, then codes part by part."""
        kept = [GgufTensor(name, tuple(tensor.shape), _type_of(tensor), partial(_whole, tensor))
                for name, tensor in extra_tensors(self.model.config).items()]  # fmt: skip
        quantized = [
            GgufTensor(layer.name, layer.shape, layer.spec.type, partial(_pack, layer)) for layer in self._layers()
        ]
        return [*kept, *self._kept(), *quantized]

    def metadata(self) -> dict[str, Value]:
        """That of the GGUF file the model came from, or what its configuration and tokenizer say."""
        own = quantization_metadata(FILE_TYPES[self.file_type].ftype)
        if self.model.gguf_file is not None and self.model.folder is not None:
            return {**copied_metadata(self.model.folder / self.model.gguf_file), **own}
        config = self.model.config
        tokens = tokenizer_metadata(self.model.tokenizer(), config.vocab_size)
        return {**metadata(config, _plain_name(self.model)), **tokens, **own}

    def write(self, file: Path) -> None:
        """Write the file; the codes of one part of the plan and a piece of one tensor are in memory.

        Raises:
            FormatError: GGUF cannot hold it; names the tensor.
        """
        write_gguf(file, self.metadata(), self.tensors())

    def verify(self, file: Path) -> None:
        """Read a file back and compare every tensor with what it was made from, bit for bit.

        Raises:
            FormatError: a tensor is missing, unexpected or different.
        """
        found = read_tensors(file)
        wanted = {tensor.name: tensor for tensor in self.tensors()}
        if missing := set(wanted) ^ set(found):
            raise FormatError(f"{file}: found other tensors than were written, such as {min(missing)}; {_ADVICE}")
        for name, tensor in wanted.items():
            if (found[name].type, found[name].shape) != (tensor.type, tensor.shape):
                raise FormatError(
                    f"{file}: {name}: found {found[name].type} {found[name].shape}; needed {tensor.type} "
                    f"{tensor.shape}; {_ADVICE}"
                )
            if tensor.type in FLOATS:
                _compare_floats(file, name, found[name].data, tensor.read())
        for layer in self._layers():
            _compare_layer(file, layer, found[layer.name].data.flatten(0, -2))

    def _kept(self) -> Iterator[GgufTensor]:
        """Tensors that are not quantized."""
        config, shapes = self.model.config, shapes_of(self.model)
        types = stored_types(self.file_type, config, shapes)
        for name, shape in shapes.items():
            if name.removesuffix(".weight") in self.plan.specs:
                continue
            heads = stored_float(config, name, torch.empty(shape, device="meta"))
            for index, (stored, head) in enumerate(zip(tensor_names(config, name), heads, strict=True)):
                kind = types[stored] if types[stored] in FLOATS else "f16"
                read = partial(_read_float, self.model, name, index, FLOATS[kind])
                yield GgufTensor(stored, tuple(head.shape), kind, read)

    def _layers(self) -> Iterator[_Layer]:
        """Every quantized layer, part by part of the plan."""
        part_codes, shapes = lru_cache(maxsize=1)(self.codes), self.plan.layers
        for index, part in enumerate(self.plan.parts):
            for relative, spec in part.specs.items():
                path = f"{part.prefix}{relative}"
                shape = shapes[path].shape
                assert isinstance(spec, GgufSpec)
                matrix = (shape.rows, shape.in_features)
                for place, name in enumerate(tensor_names(self.model.config, shape.parameter)):
                    order_O = _part(shape, place) if shape.parts > 1 else row_order(self.model.config, path)
                    codes = partial(_ordered, part_codes, index, relative, order_O)
                    yield _Layer(name, (shape.experts, *matrix) if shape.experts else matrix, spec, codes)


def _part(shape: LayerShape, place: int) -> Tensor:
    """The rows of all experts that a stack stores in one tensor of the file, int64."""
    return torch.arange(shape.out_features).view(shape.experts, shape.parts, -1)[:, place].flatten()


def _plain_name(model: Model) -> str:
    """Last part of the model's name, without what is no name."""
    path = Path(model.name)
    return (path.stem if path.suffix == ".gguf" else path.name) or "model"


def _type_of(tensor: Tensor) -> str:
    return next(name for name, dtype in FLOATS.items() if dtype == tensor.dtype)


def _whole(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor


def _read_float(model: Model, name: str, index: int, dtype: torch.dtype) -> Iterator[Tensor]:
    return pieces(stored_float(model.config, name, model.source.read(name))[index], dtype, name)


def _ordered(
    codes: Callable[[int], Mapping[str, Any]], index: int, relative: str, order_O: Tensor | None
) -> SymBlockCodes | AsymBlockCodes:
    own: SymBlockCodes | AsymBlockCodes = codes(index)[relative]
    return own if order_O is None else type(own)(*(field[order_O] for field in own))


def _split(codes: SymBlockCodes | AsymBlockCodes) -> Iterator[SymBlockCodes | AsymBlockCodes]:
    """Some rows at a time."""
    rows = max(1, PIECE // codes.q_OI.shape[1])
    for fields in zip(*(torch.split(field, rows) for field in codes), strict=True):
        yield type(codes)(*fields)


def _pack(layer: _Layer) -> Iterator[Tensor]:
    try:
        for part in _split(layer.codes()):
            yield pack_blocks(part, layer.spec)
    except FormatError as error:
        raise FormatError(f"{layer.name}: {error}") from error


def _compare_floats(file: Path, name: str, found: Tensor, wanted: Iterable[Tensor]) -> None:
    rest_N = found.reshape(-1)
    for piece_N in (piece.contiguous().view(-1).view(torch.uint8) for piece in wanted):
        _compare(file, name, rest_N[: len(piece_N)], piece_N)
        rest_N = rest_N[len(piece_N) :]


def _compare_layer(file: Path, layer: _Layer, found_ON: Tensor) -> None:
    for own in _split(layer.codes()):
        rows = len(own.q_OI)
        for field, got, wanted in zip(own._fields, unpack_blocks(found_ON[:rows], layer.spec), own, strict=True):
            _compare(file, f"{layer.name}: {field}", got, wanted)
        found_ON = found_ON[rows:]


def _compare(file: Path, where: str, found: Tensor, wanted: Tensor) -> None:
    if found.dtype != wanted.dtype or not torch.equal(found.reshape(-1), wanted.reshape(-1)):
        raise FormatError(f"{file}: {where}: found other values than were written; {_ADVICE}")
