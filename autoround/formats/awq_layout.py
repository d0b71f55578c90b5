"""The tensors of AWQ checkpoints, version "gemm": 4 bits, packed along the outputs, eight columns mixed in a word.

Legend: O output features, I input features, G groups in a row.

| name    | dtype   | shape      |
|---------|---------|------------|
| qweight | int32   | (I, O / 8) |
| qzeros  | int32   | (G, O / 8) |
| scales  | float16 | (G, O)     |
"""

from collections.abc import Mapping

from torch import Tensor

from autoround.formats.bits import pack_stream, unpack_stream
from autoround.formats.gptq_layout import check_half_scales
from autoround.func.types import IntCodes

BITS = 4
# Column of the eight that each nibble of a word holds, from the lowest nibble on.
COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
# Nibble that holds each column: the same fact, written down apart so that packing and unpacking check each other.
NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


def pack_layer(codes: IntCodes) -> dict[str, Tensor]:
    """Pack one layer; O is a multiple of 32.

    Raises:
        FormatError: scales are not float16.
    """
    check_half_scales(codes)
    return {
        "qweight": pack_stream(_pick(codes.q_OI.t(), COLUMN_OF_NIBBLE), BITS),
        "qzeros": pack_stream(_pick(codes.zero_OG.t(), COLUMN_OF_NIBBLE), BITS),
        "scales": codes.scale_OG.t().contiguous(),
    }


def unpack_layer(tensors: Mapping[str, Tensor]) -> IntCodes:
    """Undo ``pack_layer``, on the CPU."""
    q_IO, zero_GO = unpack_columns(tensors["qweight"]), unpack_columns(tensors["qzeros"])
    return IntCodes(q_IO.t(), tensors["scales"].t(), zero_GO.t())


def unpack_columns(words_NW: Tensor) -> Tensor:
    """Codes of packed outputs: int32 (N, O / 8) -> uint8 (N, O)."""
    return _pick(unpack_stream(words_NW, BITS), NIBBLE_OF_COLUMN)


def _pick(codes_NO: Tensor, order: tuple[int, ...]) -> Tensor:
    """Reorder every eight columns."""
    return codes_NO.unflatten(-1, (-1, len(order)))[..., list(order)].flatten(-2)
