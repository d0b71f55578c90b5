"""GGUF files written and read here, against the gguf package's reader."""

import struct
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from gguf import GGUFReader, GGUFValueType
from torch import Tensor

from autoround.errors import FormatError
from autoround.formats.gguf.container import (
    Encoded,
    GgufTensor,
    Value,
    copied_metadata,
    quantization_metadata,
    read_metadata,
    read_tensors,
    write_gguf,
)

METADATA: dict[str, Value] = {
    "general.architecture": "llama",
    "general.name": "Änne",
    "llama.block_count": 4_000_000_000,
    "llama.rope.freq_base": 0.1,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.tokens": ["a", "", "▁b"],
    "tokenizer.ggml.token_type": [1, -2, 3],
    "tokenizer.ggml.scores": [0.0, -1.5, 3.25],
    "a.flags": [True, False],
    "a.large": Encoded(GGUFValueType.UINT64, struct.pack("<Q", 2**63)),
}


def tensors() -> dict[str, tuple[str, tuple[int, ...], Tensor]]:
    """Name -> type, shape and data."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, 64, generator=generator)
    packed = gguf.quantize(weights.numpy(), gguf.GGMLQuantizationType.Q4_0)
    return {
        "norm.weight": ("f32", (5,), torch.randn(5, generator=generator)),
        "half.weight": ("f16", (3, 7), torch.randn(3, 7, generator=generator).half()),
        "brain.weight": ("bf16", (7, 3), torch.randn(3, 7, generator=generator).bfloat16().t()),
        "blocks.weight": ("q4_0", (6, 64), torch.from_numpy(packed)),
        "experts.weight": ("q4_0", (2, 3, 64), torch.from_numpy(packed).reshape(2, 3, -1)),
    }


def write(file: Path, metadata: dict[str, Value] | None = None) -> None:
    written = [
        GgufTensor(name, shape, kind, partial(torch.chunk, data, 2)) for name, (kind, shape, data) in tensors().items()
    ]
    write_gguf(file, METADATA if metadata is None else metadata, written)


def raw(data: Tensor) -> bytes:
    content: bytes = data.contiguous().view(torch.uint8).numpy().tobytes()
    return content


def test_the_gguf_package_reads_the_same(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf")
    reader = GGUFReader(tmp_path / "a.gguf")
    found = {key: reader.fields[key].contents() for key in METADATA}
    assert found == METADATA | {"llama.rope.freq_base": float(numpy.float32(0.1)), "a.large": 2**63}
    kinds = {key: [kind.name for kind in reader.fields[key].types] for key in METADATA}
    assert kinds == {
        "general.architecture": ["STRING"],
        "general.name": ["STRING"],
        "llama.block_count": ["UINT32"],
        "llama.rope.freq_base": ["FLOAT32"],
        "tokenizer.ggml.add_bos_token": ["BOOL"],
        "tokenizer.ggml.tokens": ["ARRAY", "STRING"],
        "tokenizer.ggml.token_type": ["ARRAY", "INT32"],
        "tokenizer.ggml.scores": ["ARRAY", "FLOAT32"],
        "a.flags": ["ARRAY", "BOOL"],
        "a.large": ["UINT64"],
    }
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert list(stored) == list(tensors())
    for name, (kind, shape, data) in tensors().items():
        assert stored[name].tensor_type.name.lower() == kind
        assert tuple(stored[name].shape) == shape[::-1]
        assert stored[name].data.tobytes() == raw(data)
        assert stored[name].data_offset % 32 == 0


def test_tensors_are_read_back(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf")
    found = read_tensors(tmp_path / "a.gguf")
    assert list(found) == list(tensors())
    for name, (kind, shape, data) in tensors().items():
        assert found[name][:2] == (kind, shape)
        assert found[name].data.dtype == torch.uint8
        assert raw(found[name].data) == raw(data)
    norm = found["norm.weight"].data.view(torch.float32)
    assert torch.equal(norm, tensors()["norm.weight"][2])
    assert found["experts.weight"].data.shape == (2, 3, 36)


def test_tensors_are_views_of_one_mapping(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").chmod(0o400)
    storages = {tensor.data.untyped_storage().data_ptr() for tensor in read_tensors(tmp_path / "a.gguf").values()}
    assert len(storages) == 1


def test_data_are_asked_for_one_after_another(tmp_path: Path) -> None:
    events: list[str] = []

    def reader(name: str, data: Tensor) -> Callable[[], Iterator[Tensor]]:
        def read() -> Iterator[Tensor]:
            events.append(name)
            yield data

        return read

    written = [GgufTensor(name, shape, kind, reader(name, data)) for name, (kind, shape, data) in tensors().items()]
    assert events == []
    write_gguf(tmp_path / "a.gguf", METADATA, written)
    assert events == list(tensors())


def test_one_piece_is_held(tmp_path: Path) -> None:
    alive: set[int] = set()
    most = 0

    def read() -> Iterator[Tensor]:
        nonlocal most
        for number in range(20):
            piece = torch.full((1000,), float(number))
            alive.add(number)
            weakref.finalize(piece, alive.remove, number)
            most = max(most, len(alive))
            yield piece
            del piece

    write_gguf(tmp_path / "a.gguf", METADATA, [GgufTensor("a.weight", (20, 1000), "f32", read)])
    assert most == 2  # the one that is written, while the next is made
    data = read_tensors(tmp_path / "a.gguf")["a.weight"].data.view(torch.float32)
    assert torch.equal(data, torch.arange(20.0)[:, None].expand(20, 1000))


def test_an_empty_file_of_metadata_only(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {"general.architecture": "llama"}, [])
    assert read_tensors(tmp_path / "a.gguf") == {}
    assert list(read_metadata(tmp_path / "a.gguf")) == ["general.architecture"]


def test_metadata_are_copied_byte_for_byte(tmp_path: Path) -> None:
    own: dict[str, Value] = {
        "split.count": 1,
        "split.no": 0,
        "general.alignment": 32,
        "quantize.imatrix.file": "imatrix.dat",
    }
    own |= quantization_metadata(15)
    assert own["general.file_type"] == 15 and own["general.quantization_version"] == 2
    write(tmp_path / "a.gguf", METADATA | own)
    copied = copied_metadata(tmp_path / "a.gguf")
    assert list(copied) == list(METADATA)
    write(tmp_path / "b.gguf", copied)
    write(tmp_path / "c.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


def test_files_of_the_gguf_package_are_copied(tmp_path: Path) -> None:
    """Every type, nested and empty arrays, bytes that are no UTF-8, and another alignment."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for kind, value in {"uint8": 200, "int8": -3, "uint16": 9, "int16": -9, "int32": -1, "int64": -(2**40)}.items():
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_float64("float64", 0.1)
    writer.add_key_value("text", b"\xff\xfe", GGUFValueType.STRING)
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_custom_alignment(64)
    data = numpy.arange(7, dtype=numpy.float32)
    writer.add_tensor("one", data)
    writer.add_tensor("two", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = copied_metadata(tmp_path / "a.gguf") | {"none": Encoded(GGUFValueType.ARRAY, struct.pack("<IQ", 8, 0))}
    assert "general.alignment" not in first and "nested" in first
    write(tmp_path / "b.gguf", first)
    assert copied_metadata(tmp_path / "b.gguf") == first
    assert torch.equal(read_tensors(tmp_path / "a.gguf")["two"].data.view(torch.float32), torch.from_numpy(data))


@pytest.mark.parametrize("kept", [0, 3, 20, 90, 500, -40])
def test_truncated_files(tmp_path: Path, kept: int) -> None:
    write(tmp_path / "a.gguf")
    content = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(content[:kept])
    with pytest.raises(FormatError, match="a.gguf: found no complete GGUF file"):
        read_tensors(tmp_path / "a.gguf")


def damaged(position: int, content: bytes) -> Callable[[bytearray], None]:
    def change(file: bytearray) -> None:
        file[position : position + len(content)] = content

    return change


@pytest.mark.parametrize(
    "change",
    [
        damaged(0, b"GGML"),
        damaged(4, b"\x00\x00\x00\x03"),  # big endian
        damaged(8, b"\xff" * 8),  # tensors
        damaged(16, b"\xff" * 8),  # values
        damaged(24, b"\xff" * 8),  # bytes of the first key
        damaged(24 + 8 + len("general.architecture"), b"\x63"),  # its type
        damaged(24 + 8, b"\xff"),  # its text
    ],
)
def test_damaged_files(tmp_path: Path, change: Callable[[bytearray], None]) -> None:
    write(tmp_path / "a.gguf")
    content = bytearray((tmp_path / "a.gguf").read_bytes())
    change(content)
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(FormatError, match="found no complete GGUF file"):
        read_metadata(tmp_path / "a.gguf")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="No such file"):
        read_metadata(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("value", "message"),
    [(-1, "cannot hold"), (2**32, "cannot hold"), ([2**31], "cannot hold"), ([], "0 types"), (["a", 1], "2 types")],
)
def test_values_that_gguf_cannot_hold(tmp_path: Path, value: Value, message: str) -> None:
    with pytest.raises(FormatError, match=f"some.key: .*{message}"):
        write_gguf(tmp_path / "a.gguf", {"some.key": value}, [])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("w", (4, 33), "multiple of 32"), ("w" * 64, (32,), "64 bytes"), ("w", (1, 1, 1, 1, 32), "5 dimensions")],
)
def test_tensors_that_gguf_cannot_hold(tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    tensor = GgufTensor(name, shape, "q4_0", lambda: torch.empty(0))
    with pytest.raises(FormatError, match=message):
        write_gguf(tmp_path / "a.gguf", {}, [tensor])
    assert not (tmp_path / "a.gguf").exists()
