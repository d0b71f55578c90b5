"""GGUF files as containers: metadata and tensors streamed into a file, and read back without copies.

The format, version 3, little endian: a header; key, type and value of every metadatum; name, shape, type and offset of
every tensor; then the data, each tensor on a multiple of 32 bytes.
"""

import math
import mmap
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from torch import Tensor

from autoround.errors import FormatError

FILE_TYPE, QUANTIZATION_VERSION = "general.file_type", "general.quantization_version"

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_ALIGNMENT, _VERSIONS, _MAX_NAME, _MAX_DIMENSIONS = 32, (2, 3), 63, 4


class Encoded(NamedTuple):
    """A value of a GGUF file as its bytes, for types that no plain Python value tells, and for exact copies."""

    type: GGUFValueType
    content: bytes


# str, bool, int (uint32) and float (float32), lists of them (numbers: int32, float32), or bytes as they are.
Value: TypeAlias = str | bool | int | float | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float] | Encoded


class GgufTensor(NamedTuple):
    """A tensor to write.

    Attributes:
        name: llama.cpp's name of it.
        shape: its logical shape in torch's order.
        type: "f32", "f16", "bf16", "q4_k", …
        read: yields the data in pieces, one after the other, when their turn comes: elements of the dtype of f32, f16
            and bf16, bytes (uint8) of other types.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    read: Callable[[], Iterable[Tensor]]


class StoredTensor(NamedTuple):
    """A tensor of a file.

    Attributes:
        type: "f32", "q4_k", …
        shape: its logical shape in torch's order.
        data: uint8, the shape with the bytes of a row as the last axis; mapped from the file, not copied.
    """

    type: str
    shape: tuple[int, ...]
    data: Tensor


def quantization_metadata(file_type: int) -> dict[str, Value]:
    """What says how a file is quantized.

    Args:
        file_type: llama.cpp's number of the recipe that gave the tensors their types.
    """
    return {QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION, FILE_TYPE: file_type}


def write_gguf(file: Path, metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> None:
    """Write a GGUF file; one piece of one tensor is in memory at a time.

    Args:
        file: replaced if it is there.
        metadata: all of it, ``general.architecture`` included.
        tensors: in the order of the file.

    Raises:
        FormatError: a value, name or shape that GGUF cannot hold.
        OSError: the file cannot be written; what is written stays.
    """
    head = _head(metadata, tensors)
    with file.open("wb") as stream:
        stream.write(head)
        for tensor in tensors:
            _write_data(stream, tensor)


def file_bytes(metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> int:
    """Size of the file that ``write_gguf`` would write; no data is read.

    Raises:
        FormatError: a value, name or shape that GGUF cannot hold.
    """
    return len(_head(metadata, tensors)) + data_bytes(tensors)


def data_bytes(tensors: Sequence[GgufTensor]) -> int:
    """How much space their data take in a file."""
    return sum(_padded(_nbytes(tensor)) for tensor in tensors)


def read_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a GGUF file, mapped into memory.

    Raises:
        FormatError: no complete GGUF file, or a type that is not known here.
    """
    _, infos, start = _read_head(file)
    size = file.stat().st_size
    mapped_N = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    tensors = {}
    for info in infos:
        shape = _byte_shape(info.name, info.type, info.shape)
        begin = start + info.offset
        end = begin + math.prod(shape)
        if end > size:
            raise _damaged(file, f"{info.name} ends at byte {end} of {size}")
        tensors[info.name] = StoredTensor(info.type, info.shape, mapped_N[begin:end].view(shape))
    return tensors


def read_metadata(file: Path) -> dict[str, Encoded]:
    """Every metadatum of a GGUF file as its bytes; a vocabulary takes a fraction of a second.

    Raises:
        FormatError: no complete GGUF file.
    """
    return _read_head(file)[0]


def copied_metadata(file: Path) -> dict[str, Value]:
    """The metadata that a file with the same model in other types takes over unchanged.

    Left out is what describes the types and the layout of this file, and how it came to them: ``general.file_type``,
    ``general.quantization_version``, ``general.alignment``, ``split.*`` and ``quantize.*``.

    Raises:
        FormatError: no complete GGUF file.
    """
    own = (FILE_TYPE, QUANTIZATION_VERSION, "general.alignment", "split.", "quantize.")
    return {key: value for key, value in read_metadata(file).items() if not key.startswith(own)}


class _Info(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: str
    offset: int


class _Cursor:
    """A place in a file's bytes that moves on with every value read."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self.position = content, 0

    def take(self, count: int) -> bytes:
        begin, self.position = self.position, self.position + count
        if self.position > len(self._content):
            raise ValueError(f"it ends at byte {len(self._content)}, within a value")
        return self._content[begin : self.position]

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def string(self) -> str:
        return self.take(self.number("<Q")).decode()

    def skip(self, kind: GGUFValueType) -> None:
        """Go behind a value."""
        if kind == GGUFValueType.STRING:
            self.take(self.number("<Q"))
        elif kind == GGUFValueType.ARRAY:
            item, count = GGUFValueType(self.number("<I")), self.number("<Q")
            if item in _SCALARS:
                self.take(struct.calcsize(_SCALARS[item]) * count)
            else:
                for _ in range(count):
                    self.skip(item)
        else:
            self.take(struct.calcsize(_SCALARS[kind]))

    def value(self) -> Encoded:
        kind = GGUFValueType(self.number("<I"))
        begin = self.position
        self.skip(kind)
        return Encoded(kind, self._content[begin : self.position])

    def info(self) -> _Info:
        name, dimensions = self.string(), self.number("<I")
        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        return _Info(name, shape, GGMLQuantizationType(self.number("<I")).name.lower(), self.number("<Q"))


def _read_head(file: Path) -> tuple[dict[str, Encoded], list[_Info], int]:
    """Metadata, tensor infos, and where the data begin."""
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            cursor = _Cursor(content)
            magic, version = cursor.number("<I"), cursor.number("<I")
            if magic != gguf.GGUF_MAGIC or version not in _VERSIONS:
                raise ValueError("it begins unlike a little-endian GGUF file of version 2 or 3")
            tensors, values = cursor.number("<Q"), cursor.number("<Q")
            metadata = {cursor.string(): cursor.value() for _ in range(values)}
            infos = [cursor.info() for _ in range(tensors)]
    except (ValueError, OSError) as error:
        raise _damaged(file, str(error)) from error
    stated = metadata.get("general.alignment")
    alignment = _ALIGNMENT if stated is None else int.from_bytes(stated.content, "little")
    return metadata, infos, _padded(cursor.position, alignment)


def _damaged(file: Path, found: str) -> FormatError:
    return FormatError(f"{file}: found no complete GGUF file: {found}; needed one; write or download it again")


def _head(metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> bytes:
    """All that comes before the data."""
    head = bytearray(struct.pack("<IIQQ", gguf.GGUF_MAGIC, gguf.GGUF_VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        encoded = _encode(key, value)
        head += _string(key) + struct.pack("<I", encoded.type) + encoded.content
    offset = 0
    for tensor in tensors:
        head += _info(tensor, offset)
        offset += _padded(_nbytes(tensor))
    return bytes(head) + bytes(_padded(len(head)) - len(head))


def _encode(key: str, value: Value) -> Encoded:
    """Bytes of a value, its type from that of the plain value."""
    if isinstance(value, Encoded):
        return value
    try:
        if isinstance(value, str | bool | int | float):
            return _encode_item(value, GGUFValueType.UINT32)
        items = [_encode_item(item, GGUFValueType.INT32) for item in value]
    except struct.error as error:
        raise FormatError(f"{key}: found a number that GGUF cannot hold: {error}; correct the model's files") from error
    kinds = {item.type for item in items}
    if len(kinds) != 1:
        raise FormatError(f"{key}: found {len(kinds)} types of items in a list; needed one; correct the model's files")
    content = struct.pack("<IQ", *kinds, len(items)) + b"".join(item.content for item in items)
    return Encoded(GGUFValueType.ARRAY, content)


def _encode_item(value: str | bool | int | float, integer: GGUFValueType) -> Encoded:
    if isinstance(value, str):
        return Encoded(GGUFValueType.STRING, _string(value))
    number = integer if isinstance(value, int) else GGUFValueType.FLOAT32
    kind = GGUFValueType.BOOL if isinstance(value, bool) else number
    return Encoded(kind, struct.pack(_SCALARS[kind], value))


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _info(tensor: GgufTensor, offset: int) -> bytes:
    name = _string(tensor.name)
    if len(name) - 8 > _MAX_NAME or not 1 <= len(tensor.shape) <= _MAX_DIMENSIONS:
        raise FormatError(
            f"{tensor.name}: found {len(tensor.shape)} dimensions and a name of {len(name) - 8} bytes; "
            f"needed 1 to {_MAX_DIMENSIONS} and at most {_MAX_NAME}"
        )
    dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
    return name + dimensions + struct.pack("<IQ", GGMLQuantizationType[tensor.type.upper()], offset)


def _byte_shape(name: str, kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with the bytes of a row as the last axis."""
    columns, nbytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
    if shape[-1] % columns:
        raise FormatError(f"{name}: found rows of {shape[-1]}; needed a multiple of {columns} for {kind}")
    return *shape[:-1], shape[-1] // columns * nbytes


def _padded(size: int, alignment: int = _ALIGNMENT) -> int:
    return -(-size // alignment) * alignment


def _write_data(stream: BinaryIO, tensor: GgufTensor) -> None:
    dtype, size, written = FLOATS.get(tensor.type, torch.uint8), _nbytes(tensor), 0
    for piece in tensor.read():
        assert piece.dtype == dtype, f"{tensor.name}: {piece.dtype}"
        written += stream.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
    assert written == size, f"{tensor.name}: {written} of {size} bytes"
    stream.write(bytes(_padded(size) - size))


def _nbytes(tensor: GgufTensor) -> int:
    return math.prod(_byte_shape(tensor.name, tensor.type, tensor.shape))
