"""The bytes of GGUF blocks: legacy types of 32 columns and k-quants of 256.

Packing goes through the fields of a block in file order and merges strided lanes of values; unpacking looks every value
up at a byte and a shift. The two tables are written down apart, so that neither side hides a mistake of the other.

Legend: O output features, I input features, G groups in a row, K blocks in a row, N bytes in a row,
V values in a block, Y bytes in a block.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoround.errors import FormatError
from autoround.func.types import AsymBlockCodes, SymBlockCodes
from autoround.spec import GgufSpec


def pack_blocks(codes: SymBlockCodes | AsymBlockCodes, spec: GgufSpec) -> Tensor:
    """Lay codes out as the blocks of a GGUF file.

    Args:
        codes: of the kind of ``spec``; where a block is one group (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0) its scales and minima
            are 1.
        spec: names the type.

    Returns:
        uint8 (O, I / block_columns * nbytes), on the device of the codes.

    Raises:
        FormatError: codes of another kind, shape or dtype, or values that the type cannot hold.

    >>> half = torch.tensor([[0.5]], dtype=torch.float16)
    >>> codes = SymBlockCodes(torch.full((1, 32), 9, dtype=torch.uint8), torch.ones(1, 1, dtype=torch.int8), half)
    >>> bytes(pack_blocks(codes, GgufSpec(type="q4_0"))[0].tolist()).hex(" ", 2)
    '0038 9999 9999 9999 9999 9999 9999 9999 9999'
    """
    _check(codes, spec)
    blocks = codes.d_OK.shape[1]
    return torch.cat([_write(field, codes, blocks) for field in _FIELDS[spec.type]], dim=-1).flatten(1)


def unpack_blocks(bytes_ON: Tensor, spec: GgufSpec) -> SymBlockCodes | AsymBlockCodes:
    """Undo ``pack_blocks``.

    Args:
        bytes_ON: uint8 (O, N), whole blocks of the type that ``spec`` names.
        spec: names the type.

    Returns:
        Codes of the kind of ``spec``; scales and minima are 1 where a block is one group.

    Raises:
        FormatError: something else than rows of whole blocks.

    >>> unpack_blocks(torch.zeros(1, 34, dtype=torch.uint8), GgufSpec(type="q8_0")).q_OI.unique().tolist()
    [128]
    """
    nbytes = spec.layout.nbytes
    if bytes_ON.dtype != torch.uint8 or bytes_ON.dim() != 2 or bytes_ON.shape[1] % nbytes:
        found = f"{bytes_ON.dtype} of shape {tuple(bytes_ON.shape)}"
        raise FormatError(f"{spec} blocks: found {found}; needed uint8 rows of {nbytes}-byte blocks; write them anew")
    blocks_OKY, place = bytes_ON.reshape(len(bytes_ON), -1, nbytes), _PLACES[spec.type]
    q_OI = _read(blocks_OKY, place.q)
    d_OK = _read_half(blocks_OKY, place.d)
    if not spec.sym:
        dmin_OK = _read_half(blocks_OKY, place.dmin)
        if place.scale:
            return AsymBlockCodes(q_OI, _read(blocks_OKY, place.scale), _read(blocks_OKY, place.min), d_OK, dmin_OK)
        one_OK = torch.ones_like(d_OK, dtype=torch.uint8)
        return AsymBlockCodes(q_OI, one_OK, one_OK.clone(), d_OK, -dmin_OK)
    if place.signed_q:
        q_OI ^= 0x80
    if not place.scale:
        return SymBlockCodes(q_OI, torch.ones_like(d_OK, dtype=torch.int8), d_OK)
    return SymBlockCodes(q_OI, _read(blocks_OKY, place.scale).view(torch.int8) - place.scale_zero, d_OK)


def _check(codes: SymBlockCodes | AsymBlockCodes, spec: GgufSpec) -> None:
    """Refuse codes that are not of this type, or that its fields cannot hold."""
    kind = SymBlockCodes if spec.sym else AsymBlockCodes
    if not isinstance(codes, kind):
        raise FormatError(f"{spec} blocks: found {type(codes).__name__}; needed {kind.__name__}; choose another type")
    rows, columns = codes.q_OI.shape
    blocks = columns // spec.block_columns
    groups = torch.int8 if spec.sym else torch.uint8
    needed = {"q_OI": (torch.uint8, columns), "d_OK": (torch.float16, blocks), "dmin_OK": (torch.float16, blocks)}
    for name, tensor in codes._asdict().items():
        dtype, length = needed.get(name, (groups, blocks * spec.layout.groups))
        if tensor.dtype != dtype or tensor.shape != (rows, length) or columns % spec.block_columns:
            found = f"{name} {tensor.dtype} of shape {tuple(tensor.shape)}"
            needs = f"{dtype} of shape {(rows, length)}, {spec.block_columns} columns in a block"
            raise FormatError(f"{spec} blocks: found {found}; needed {needs}; quantize for this type")
        lowest, highest = _range(name, spec)
        if tensor.numel() and not (tensor.min() >= lowest and tensor.max() <= highest):  # so that nan is refused too
            found = f"{name} from {tensor.min()} to {tensor.max()}"
            raise FormatError(f"{spec} blocks: found {found}; needed {lowest} to {highest}; quantize for this type")


def _range(name: str, spec: GgufSpec) -> tuple[float, float]:
    """Least and greatest value of a field of the codes."""
    if name in ("d_OK", "dmin_OK"):
        return torch.finfo(torch.float16).min, torch.finfo(torch.float16).max
    return (0, spec.code_max) if name == "q_OI" else spec.level_range


# Packing: the fields of a block, in the order of the file.


class _Field(NamedTuple):
    """Bits ``low`` to ``low + width - 1`` of the values: a byte holds ``8 // width`` of them, ``run`` values apart."""

    values: Callable[[Any], Tensor]
    width: int = 8
    run: int = 1
    low: int = 0


def _write(field: _Field, codes: SymBlockCodes | AsymBlockCodes, blocks: int) -> Tensor:
    """One field of every block: uint8 (O, K, bytes of the field)."""
    values = field.values(codes)
    lanes, mask = 8 // field.width, (1 << field.width) - 1
    # Dimensions: O, K, stretches of bytes, lanes, bytes in a stretch.
    parts = values.reshape(len(values), blocks, -1, lanes, field.run)
    merged: Tensor = (parts[..., 0, :] >> field.low) & mask
    for lane in range(1, lanes):
        merged |= ((parts[..., lane, :] >> field.low) & mask) << (lane * field.width)
    return merged.flatten(2)


def _q(codes: SymBlockCodes | AsymBlockCodes) -> Tensor:
    return codes.q_OI


def _signed_q(codes: SymBlockCodes) -> Tensor:
    return codes.q_OI ^ 0x80


def _d(codes: SymBlockCodes | AsymBlockCodes) -> Tensor:
    return codes.d_OK.contiguous().view(torch.uint8)


def _dmin(codes: AsymBlockCodes) -> Tensor:
    return codes.dmin_OK.contiguous().view(torch.uint8)


def _m(codes: AsymBlockCodes) -> Tensor:
    return (-codes.dmin_OK).contiguous().view(torch.uint8)


def _scale(codes: SymBlockCodes) -> Tensor:
    return codes.scale_OG.view(torch.uint8)


def _scale_from_32(codes: SymBlockCodes) -> Tensor:
    return (codes.scale_OG + 32).view(torch.uint8)


def _nibbles(codes: AsymBlockCodes) -> Tensor:
    return codes.scale_OG | codes.min_OG << 4


def _six_bits(codes: AsymBlockCodes) -> Tensor:
    """Eight scales and eight minima of 6 bits in 12 bytes: the later four of each are split in 2 and 4 bits."""
    rows = len(codes.scale_OG)
    first_scale, last_scale = codes.scale_OG.reshape(rows, -1, 2, 4).unbind(2)
    first_min, last_min = codes.min_OG.reshape(rows, -1, 2, 4).unbind(2)
    scales = first_scale | last_scale >> 4 << 6
    minima = first_min | last_min >> 4 << 6
    return torch.cat([scales, minima, last_scale & 15 | last_min << 4], dim=-1).flatten(1)


_FIELDS: Mapping[str, tuple[_Field, ...]] = MappingProxyType({
    "q4_0": (_Field(_d), _Field(_q, 4, 16)),
    "q4_1": (_Field(_d), _Field(_m), _Field(_q, 4, 16)),
    "q5_0": (_Field(_d), _Field(_q, 1, 1, low=4), _Field(_q, 4, 16)),
    "q5_1": (_Field(_d), _Field(_m), _Field(_q, 1, 1, low=4), _Field(_q, 4, 16)),
    "q8_0": (_Field(_d), _Field(_signed_q)),
    "q2_k": (_Field(_nibbles), _Field(_q, 2, 32), _Field(_d), _Field(_dmin)),
    "q3_k": (
        _Field(_q, 1, 32, low=2), _Field(_q, 2, 32),
        _Field(_scale_from_32, 4, 8), _Field(_scale_from_32, 2, 4, low=4), _Field(_d),
    ),
    "q4_k": (_Field(_d), _Field(_dmin), _Field(_six_bits), _Field(_q, 4, 32)),
    "q5_k": (_Field(_d), _Field(_dmin), _Field(_six_bits), _Field(_q, 1, 32, low=4), _Field(_q, 4, 32)),
    "q6_k": (_Field(_q, 4, 64), _Field(_q, 2, 32, low=4), _Field(_scale), _Field(_d)),
})  # fmt: skip


# Unpacking: where every value of a block is found.


class _Bits(NamedTuple):
    """Where bits ``low`` and up of the values are: ``width`` of them, in a byte of the block, above a shift."""

    low: int
    width: int
    byte_V: tuple[int, ...]
    shift_V: tuple[int, ...]


class _Place(NamedTuple):
    """Where a block holds what; offsets count bytes. Scales are stored with ``scale_zero`` added."""

    d: int
    q: tuple[_Bits, ...]
    dmin: int = 0
    scale: tuple[_Bits, ...] = ()
    min: tuple[_Bits, ...] = ()
    signed_q: bool = False
    scale_zero: int = 0


def _read(blocks_OKY: Tensor, places: Iterable[_Bits]) -> Tensor:
    """Values of every block, uint8 (O, K * V)."""
    values_OKV = None
    for low, width, byte_V, shift_V in places:
        index_V = torch.tensor(byte_V, device=blocks_OKY.device)
        found_OKV = blocks_OKY.index_select(-1, index_V)
        found_OKV >>= torch.tensor(shift_V, dtype=torch.uint8, device=blocks_OKY.device)
        found_OKV &= (1 << width) - 1
        found_OKV <<= low
        values_OKV = found_OKV if values_OKV is None else values_OKV.bitwise_or_(found_OKV)
    assert values_OKV is not None
    return values_OKV.flatten(1)


def _read_half(blocks_OKY: Tensor, offset: int) -> Tensor:
    """The float16 at an offset of every block, (O, K)."""
    return blocks_OKY[..., offset : offset + 2].contiguous().view(torch.float16).squeeze(-1)


def _codes(first: int, width: int, span: int, columns: int, *, low: int = 0) -> _Bits:
    """Codes whose bits start at byte ``first``: ``span`` columns share a shift, and ``span`` bytes hold them."""
    spans = [divmod(column, span) for column in range(columns)]
    per_byte = 8 // width
    byte_V = tuple(first + number // per_byte * span + rest for number, rest in spans)
    return _Bits(low, width, byte_V, tuple(number % per_byte * width for number, _ in spans))


def _six_bit_places(first: int, shift: int) -> tuple[_Bits, ...]:
    """Six-bit values: 0 to 3 in the bytes from ``first`` on, 4 to 7 above ``shift`` in bytes 12 to 15 and on top."""
    own = tuple(range(first, first + 4))
    return (
        _Bits(0, 4, (*own, 12, 13, 14, 15), (0, 0, 0, 0, shift, shift, shift, shift)),
        _Bits(4, 2, own + own, (4, 4, 4, 4, 6, 6, 6, 6)),
    )


_PLACES: Mapping[str, _Place] = MappingProxyType({
    "q4_0": _Place(d=0, q=(_codes(2, 4, 16, 32),)),
    "q4_1": _Place(d=0, dmin=2, q=(_codes(4, 4, 16, 32),)),
    "q5_0": _Place(d=0, q=(_codes(6, 4, 16, 32), _codes(2, 1, 1, 32, low=4))),
    "q5_1": _Place(d=0, dmin=2, q=(_codes(8, 4, 16, 32), _codes(4, 1, 1, 32, low=4))),
    "q8_0": _Place(d=0, q=(_codes(2, 8, 32, 32),), signed_q=True),
    "q2_k": _Place(
        d=80, dmin=82, q=(_codes(16, 2, 32, 256),),
        scale=(_Bits(0, 4, tuple(range(16)), (0,) * 16),), min=(_Bits(0, 4, tuple(range(16)), (4,) * 16),),
    ),
    "q3_k": _Place(
        d=108, q=(_codes(32, 2, 32, 256), _codes(0, 1, 32, 256, low=2)), scale_zero=32,
        scale=(
            _Bits(0, 4, tuple(range(96, 104)) * 2, (0,) * 8 + (4,) * 8),
            _Bits(4, 2, tuple(range(104, 108)) * 4, (0,) * 4 + (2,) * 4 + (4,) * 4 + (6,) * 4),
        ),
    ),
    "q4_k": _Place(
        d=0, dmin=2, q=(_codes(16, 4, 32, 256),), scale=_six_bit_places(4, 0), min=_six_bit_places(8, 4)
    ),
    "q5_k": _Place(
        d=0, dmin=2, q=(_codes(48, 4, 32, 256), _codes(16, 1, 32, 256, low=4)),
        scale=_six_bit_places(4, 0), min=_six_bit_places(8, 4),
    ),
    "q6_k": _Place(
        d=208, q=(_codes(0, 4, 64, 256), _codes(128, 2, 32, 256, low=4)),
        scale=(_Bits(0, 8, tuple(range(192, 208)), (0,) * 16),),
    ),
})  # fmt: skip
