"""GGUF blocks: bytes worked out by hand, what the gguf package reads from them, the way back, refusals."""

import re

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autoround.errors import FormatError
from autoround.formats.gguf.blocks import pack_blocks, unpack_blocks
from autoround.func.types import AsymBlockCodes, SymBlockCodes
from autoround.spec import GGUF_TYPES, GgufSpec

Codes = SymBlockCodes | AsymBlockCodes

E32, E256 = torch.arange(32), torch.arange(256)
# Nibbles l and l + 1 of byte l, as bytes; moved by two per 64 columns in the pinned codes of Q4_K and Q5_K.
STAIRS = bytes.fromhex("1021324354657687 98a9bacbdcedfe0f") * 2
SCALES_4K, MINS_4K = [1, 2, 3, 4, 0x15, 0x26, 0x37, 0x08], [5, 6, 7, 8, 0x39, 0x2A, 0x1B, 0x0C]
# Byte 0: scale 1 with the 1 of 0x15 on top; byte 4: minimum 5 with the 3 of 0x39; byte 8: their last digits.
SIX_BITS = bytes.fromhex("4182c304 c5864708 95a6b7c8")


def _half(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float16)


def _sym(q: Tensor, scale: list[int], d: float) -> SymBlockCodes:
    return SymBlockCodes(q[None].to(torch.uint8), torch.tensor([scale], dtype=torch.int8), _half(d))


def _asym(q: Tensor, scale: list[int], minimum: list[int], d: float, dmin: float) -> AsymBlockCodes:
    groups = [torch.tensor([values], dtype=torch.uint8) for values in (scale, minimum)]
    return AsymBlockCodes(q[None].to(torch.uint8), *groups, _half(d), _half(dmin))


def _turned(data: bytes, by: int) -> bytes:
    return data[by:] + data[:by]


# Float16: 1.0 is 0x3c00, 0.5 is 0x3800, -0.5 is 0xb800, -2.0 is 0xc000, low byte first.
PINNED: dict[str, tuple[Codes, bytes]] = {
    # Columns 0 and 16 share a byte, and have equal codes.
    "q4_0": (_sym(E32 % 16, [1], -2.0), b"\x00\xc0" + bytes(0x11 * i for i in range(16))),
    # Code 15 - column: the second half of the columns, in the high nibbles, holds one less.
    "q4_1": (
        _asym((15 - E32 // 16 - E32) % 16, [1], [1], 1.0, 0.5),
        bytes.fromhex("003c 00b8 efdecdbcab9a8978 67564534231201f0"),
    ),
    # Codes 0 to 31: the last sixteen have the fifth bit.
    "q5_0": (_sym(E32, [1], 1.0), b"\x00\x3c\x00\x00\xff\xff" + bytes(0x11 * i for i in range(16))),
    # Codes 31 to 0: the first sixteen have the fifth bit.
    "q5_1": (
        _asym(31 - E32, [1], [1], 0.5, -1.0),
        b"\x00\x38\x00\x3c\xff\xff\x00\x00" + bytes(0x11 * (15 - i) for i in range(16)),
    ),
    # -16 to 15 in two's complement.
    "q8_0": (_sym(112 + E32, [1], 1.0), b"\x00\x3c" + bytes(range(0xF0, 0x100)) + bytes(range(16))),
    # Stretch s of 32 columns in bits 2s and up; its codes start at s, 128 columns later at s + 1, and go up.
    "q2_k": (
        _asym((E256 // 32 + E256 + E256 // 128) % 4, [*range(16)], [*range(15, -1, -1)], 1.0, 0.5),
        bytes.fromhex("f0e1d2c3b4a5968778695a4b3c2d1e0f" + "e4394e93" * 8 + "394e93e4" * 8 + "003c 0038"),
    ),
    # Codes of stretch k start at k and go up modulo 8: bit k of mask byte l is the 4 in (k + l) % 8.
    # Stored scales are k + 16 * (k // 4), in nibbles of eight bytes and, for their upper bits, quarters of four.
    "q3_k": (
        _sym((E256 // 32 + E256) % 8, [k + 16 * (k // 4) - 32 for k in range(16)], -2.0),
        bytes.fromhex("f0783c1e0f87c3e1" * 4 + "e4394e93" * 16 + "8091a2b3c4d5e6f7" + "e4" * 4 + "00c0"),
    ),
    "q4_k": (
        _asym((E256 // 32 + E256) % 16, SCALES_4K, MINS_4K, 1.0, 0.5),
        b"\x00\x3c\x00\x38" + SIX_BITS + b"".join(_turned(STAIRS, 2 * part) for part in range(4)),
    ),
    # The fifth bit of stretch k is set where 16 <= k + l < 32: bit k of byte l.
    "q5_k": (
        _asym((E256 // 32 + E256) % 32, SCALES_4K, MINS_4K, 1.0, 0.5),
        b"\x00\x3c\x00\x38" + SIX_BITS
        + bytes.fromhex("000000000000000000 80c0e0f0f8fcfe ffffffffffffffffff 7f3f1f0f070301")
        + b"".join(_turned(STAIRS, 2 * part) for part in range(4)),
    ),
    # Codes of quarter a are a, a + 1, ... a + 63 modulo 64: low nibbles climb as above over 64 bytes. The upper bits
    # of columns l, l + 32, l + 64 and l + 96: 0 2 0 2, then 0 2 1 3, 1 3 1 3 and 1 3 2 0; one half later two columns
    # earlier, and then 2 0 2 0.
    "q6_k": (
        _sym((E256 + E256 // 64) % 64, [*range(-8, 8)], 0.5),
        STAIRS * 2 + _turned(STAIRS, 2) * 2
        + bytes.fromhex("88" * 15 + "d8" + "dd" * 15 + "2d" + "88" * 13 + "d8" + "dd" * 15 + "2d" + "2222")
        + bytes(range(0xF8, 0x100)) + bytes(range(8)) + b"\x00\x38",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_pinned_bytes(name: str) -> None:
    codes, data = PINNED[name]
    spec = GgufSpec(type=name)
    packed = pack_blocks(codes, spec)
    assert packed.dtype == torch.uint8
    assert bytes(packed[0].tolist()).hex() == data.hex()
    _assert_equal(unpack_blocks(torch.tensor([[*data]], dtype=torch.uint8), spec), codes)


@st.composite
def _draw_codes(draw: st.DrawFn, spec: GgufSpec) -> Codes:
    """Random codes; a drawn share of the values is the lowest or the highest one."""
    rows, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    extreme = draw(st.sampled_from([0.0, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def integers(low: int, high: int, length: int, dtype: torch.dtype) -> Tensor:
        values = torch.randint(low, high + 1, (rows, length), generator=generator)
        ends = torch.randint(2, (rows, length), generator=generator) * (high - low) + low
        return torch.where(torch.rand(rows, length, generator=generator) < extreme, ends, values).to(dtype)

    def factors() -> Tensor:
        spread = draw(st.sampled_from([0.0, 1e-7, 1e-4, 1.0, 1e3]))
        return (torch.randn(rows, blocks, generator=generator) * spread).half()

    layout = spec.layout
    groups, top = blocks * layout.groups, 1 << layout.scale_bits
    low, high = (1, 1) if top == 1 else (-top // 2, top // 2 - 1) if spec.sym else (0, top - 1)
    q = integers(0, spec.code_max, blocks * spec.block_columns, torch.uint8)
    if spec.sym:
        return SymBlockCodes(q, integers(low, high, groups, torch.int8), factors())
    scale, minimum = (integers(low, high, groups, torch.uint8) for _ in range(2))
    return AsymBlockCodes(q, scale, minimum, factors(), factors())


def _values(codes: Codes, spec: GgufSpec) -> Tensor:
    """The weight in float32, in the order of operations that the types state."""
    columns, groups = spec.group_size, spec.layout.groups
    scale = codes.d_OK.float().repeat_interleave(groups, 1) * codes.scale_OG.float()
    if isinstance(codes, SymBlockCodes):
        return scale.repeat_interleave(columns, 1) * (codes.q_OI.float() - spec.midpoint)
    shift = codes.dmin_OK.float().repeat_interleave(groups, 1) * codes.min_OG.float()
    return scale.repeat_interleave(columns, 1) * codes.q_OI.float() - shift.repeat_interleave(columns, 1)


def _assert_equal(found: Codes, expected: Codes) -> None:
    assert type(found) is type(expected)
    for name, tensor in expected._asdict().items():
        other = getattr(found, name)
        assert other.dtype == tensor.dtype, name
        assert torch.equal(other, tensor), name


@pytest.mark.parametrize("name", GGUF_TYPES)
@given(data=st.data())
def test_gguf_reads_the_same_weight(name: str, data: st.DataObject) -> None:
    spec = GgufSpec(type=name)
    codes = data.draw(_draw_codes(spec))
    packed = pack_blocks(codes, spec)
    assert packed.shape == (len(codes.q_OI), codes.d_OK.shape[1] * spec.layout.nbytes)
    read = torch.from_numpy(gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name.upper()]))
    assert torch.equal(read.view(torch.int32), _values(codes, spec).view(torch.int32))
    _assert_equal(unpack_blocks(packed, spec), codes)


@pytest.mark.parametrize("name", GGUF_TYPES)
@given(seed=st.integers(0, 2**31))
def test_every_byte_means_something(name: str, seed: int) -> None:
    """Any file, not only ours, is read as the gguf package reads it, and written back as it was."""
    spec = GgufSpec(type=name)
    draw = torch.Generator().manual_seed(seed)
    data = torch.randint(256, (2, 3 * spec.layout.nbytes), dtype=torch.uint8, generator=draw)
    codes = unpack_blocks(data, spec)
    finite = {key: torch.full_like(tensor, 1.5) for key, tensor in codes._asdict().items() if key.startswith("d")}
    packed = pack_blocks(codes._replace(**finite), spec)
    read = torch.from_numpy(gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name.upper()]))
    assert torch.equal(read, _values(codes._replace(**finite), spec))
    changed = (packed != data).reshape(6, -1).any(0).nonzero().flatten().tolist()
    assert set(changed) <= FACTORS[name]


# The bytes of d and dmin: first in some types, last in others.
FACTORS = {
    **dict.fromkeys(("q4_0", "q5_0", "q8_0"), {0, 1}),
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), {0, 1, 2, 3}),
    "q2_k": {80, 81, 82, 83},
    "q3_k": {108, 109},
    "q6_k": {208, 209},
}


def test_strided_codes() -> None:
    codes, data = PINNED["q6_k"]
    two = SymBlockCodes(*(torch.cat([tensor, tensor]).t().contiguous().t() for tensor in codes))
    assert pack_blocks(two, GgufSpec(type="q6_k")).tolist() == [[*data]] * 2


def _pinned(name: str, **fields: Tensor) -> Codes:
    return PINNED[name][0]._replace(**fields)


@pytest.mark.parametrize(
    ("name", "codes", "message"),
    [
        ("q4_0", _pinned("q4_1"), "found AsymBlockCodes; needed SymBlockCodes"),
        ("q4_k", _pinned("q6_k"), "found SymBlockCodes; needed AsymBlockCodes"),
        ("q4_0", _pinned("q5_0"), "found q_OI from 0 to 31; needed 0 to 15"),
        ("q6_k", _pinned("q6_k", q_OI=torch.full((1, 256), 64, dtype=torch.uint8)), "found q_OI from 64 to 64"),
        ("q4_0", _pinned("q4_0", scale_OG=torch.tensor([[2]], dtype=torch.int8)), "needed 1 to 1"),
        ("q5_1", _pinned("q5_1", min_OG=torch.tensor([[0]], dtype=torch.uint8)), "found min_OG from 0 to 0"),
        ("q3_k", _pinned("q3_k", scale_OG=torch.full((1, 16), 32, dtype=torch.int8)), "needed -32 to 31"),
        ("q3_k", _pinned("q3_k", scale_OG=torch.full((1, 16), -33, dtype=torch.int8)), "needed -32 to 31"),
        ("q2_k", _pinned("q2_k", scale_OG=torch.full((1, 16), 16, dtype=torch.uint8)), "found scale_OG"),
        ("q4_k", _pinned("q4_k", min_OG=torch.full((1, 8), 64, dtype=torch.uint8)), "needed 0 to 63"),
        ("q8_0", _pinned("q8_0", d_OK=_half(float("nan"))), "found d_OK from nan"),
        ("q2_k", _pinned("q2_k", dmin_OK=_half(float("inf"))), "found dmin_OK from inf"),
        ("q6_k", _pinned("q6_k", d_OK=torch.ones(1, 1)), "needed torch.float16 of shape (1, 1)"),
        ("q6_k", _pinned("q6_k", scale_OG=torch.ones(1, 16)), "needed torch.int8 of shape (1, 16)"),
        ("q6_k", _pinned("q6_k", scale_OG=torch.ones(1, 8, dtype=torch.int8)), "of shape (1, 8); needed"),
        ("q3_k", _pinned("q3_k", q_OI=torch.zeros(1, 288, dtype=torch.uint8)), "256 columns in a block"),
    ],
)  # fmt: skip
def test_refused_codes(name: str, codes: Codes, message: str) -> None:
    with pytest.raises(FormatError, match=re.escape(message)) as caught:
        pack_blocks(codes, GgufSpec(type=name))
    assert str(caught.value).startswith(f"{name.upper()} blocks: found")


@pytest.mark.parametrize(
    "data", [torch.zeros(1, 143, dtype=torch.uint8), torch.zeros(144, dtype=torch.uint8), torch.zeros(1, 144)]
)
def test_refused_bytes(data: Tensor) -> None:
    with pytest.raises(FormatError, match="Q4_K blocks: found .*; needed uint8 rows of 144-byte blocks"):
        unpack_blocks(data, GgufSpec(type="q4_k"))
