"""The dense little-endian bit stream of GPTQ checkpoints: 32 codes of ``bits`` bits in ``bits`` words of 32 bits.

Code number v of 32 starts at bit ``v * bits`` of the stream; at 3 bits, codes 10 and 21 straddle two words.
Packing shifts 64-bit integers and unpacking reads single bits, so that neither hides a mistake of the other.

Legend: N rows, V codes in a row, W words in a row, B bits of a code.
"""

import numpy as np
import torch
from torch import Tensor

PERIOD = 32
# Codes handled at once: their intermediate integers fit a processor's cache.
_CHUNK = 2**17


def pack_stream(codes_NV: Tensor, bits: int) -> Tensor:
    """Pack codes along their last dimension.

    Args:
        codes_NV: integers in [0, 2**bits - 1]; V is a multiple of 32.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 (N, V * bits / 32), two's-complement bit patterns, on the CPU; of codes without data the shape.

    >>> [hex(word) for word in pack_stream(torch.arange(32)[None] % 8, 4).tolist()[0]]
    ['0x76543210', '0x76543210', '0x76543210', '0x76543210']
    """
    rows, columns = codes_NV.shape
    shape = rows, columns // PERIOD * bits
    if codes_NV.is_meta:
        return torch.empty(shape, dtype=torch.int32, device="meta")
    start = torch.arange(PERIOD) * bits
    word, shift = start // 32, start % 32
    words_NW, step = torch.empty(shape, dtype=torch.int32), max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        part_NV = codes_NV[first : first + step].cpu()
        shifted = part_NV.long().reshape(len(part_NV), -1, PERIOD) << shift
        words = torch.zeros(*shifted.shape[:-1], bits + 1, dtype=torch.int64)
        words.index_add_(-1, word, shifted & 0xFFFFFFFF)
        words.index_add_(-1, word + 1, shifted >> 32)
        words_NW[first : first + step] = words[..., :bits].flatten(-2)
    return words_NW


def unpack_stream(words_NW: Tensor, bits: int) -> Tensor:
    """Undo ``pack_stream``.

    Args:
        words_NW: int32; W is a multiple of ``bits``.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 (N, W * 32 / bits).

    >>> unpack_stream(torch.tensor([[0x76543210]], dtype=torch.int32), 4).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    octets = np.ascontiguousarray(words_NW.cpu().numpy()).astype("<i4", copy=False).view(np.uint8)
    rows = max(1, _CHUNK // (octets.shape[1] * 8))
    codes_NV = np.zeros((len(octets), octets.shape[1] * 8 // bits), dtype=np.uint8)
    for first in range(0, len(octets), rows):
        part_NV = codes_NV[first : first + rows]
        single_NVB = np.unpackbits(octets[first : first + rows], axis=1, bitorder="little").reshape(
            *part_NV.shape, bits
        )
        for place in range(bits):
            part_NV |= single_NVB[..., place] << place
    return torch.from_numpy(codes_NV)
