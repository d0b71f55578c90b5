"""Checkpoints of fewer than 16 bits as sources: FP8 with scales of blocks, and MXFP4. They read as bfloat16.

Legend: O output features, I input features, R rows and C columns of scales, E experts, G groups in a row, H bytes of a
group, each of two values.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from autoround.errors import ModelError

# Values of ``quant_method`` of the checkpoints that are read here.
METHODS = ("fp8", "mxfp4")
# Rows and columns that share a scale in FP8, where shapes do not tell.
BLOCK = 128
DTYPE = torch.bfloat16
# What the four bits of MXFP4 stand for: a sign, two bits of exponent, one of mantissa.
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
# Scales of inputs, which weights do not need.
_OF_INPUTS = ("activation_scale", "input_scale")


class Folded(NamedTuple):
    """The tensors of a checkpoint as they read.

    Attributes:
        heads: name -> tensor without data.
        parts: those that are stored in two -> names of the values and of their scales.
    """

    heads: dict[str, Tensor]
    parts: dict[str, tuple[str, str]]


def fold(heads: Mapping[str, Tensor], where: str) -> Folded:
    """Find the tensors that are stored as values and scales.

    Args:
        heads: the stored tensors by name, without data.
        where: the checkpoint, for messages.

    Raises:
        ModelError: FP8 values have no scales.

    >>> stored = {"up_blocks": torch.zeros(2, 6, 1, 16, dtype=torch.uint8), "up_scales": torch.zeros(2, 6, 1)}
    >>> {name: tuple(head.shape) for name, head in fold(stored, "model").heads.items()}
    {'up': (2, 32, 6)}
    """
    found: dict[str, Tensor] = {}
    parts: dict[str, tuple[str, str]] = {}
    scales = {f"{key}{_SCALE}" for key, head in heads.items() if head.dtype in _FP8}
    for key, head in heads.items():
        base = key.removesuffix(_BLOCKS)
        if key in scales or key.endswith(_OF_INPUTS) or (key.endswith(_SCALES) and _blocks_of(key) in heads):
            continue
        if head.dtype in _FP8:
            if f"{key}{_SCALE}" not in heads:
                raise ModelError(
                    f"{where}: found {key} in FP8 without {key}{_SCALE}; needed scales of blocks, as DeepSeek-V3 has "
                    "them; give a checkpoint of 16 bits"
                )
            found[key], parts[key] = torch.empty(head.shape, dtype=DTYPE, device="meta"), (key, f"{key}{_SCALE}")
        elif base != key and f"{base}{_SCALES}" in heads:
            *stack, rows, groups, size = head.shape
            found[base] = torch.empty(*stack, groups * size * 2, rows, dtype=DTYPE, device="meta")
            parts[base] = (key, f"{base}{_SCALES}")
        else:
            found[key] = head
    return Folded(found, parts)


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """A tensor that is stored as values and scales, in bfloat16.

    Args:
        values: FP8 of any shape, or bytes of MXFP4.
        scales: those of its blocks.

    Raises:
        ModelError: their shapes do not belong together.
    """
    return dequantize_mxfp4(values, scales) if values.dtype == torch.uint8 else dequantize_fp8(values, scales)


def dequantize_fp8(weight_OI: Tensor, scale_RC: Tensor) -> Tensor:
    """``weight * scale``, each scale being that of a block of 128 x 128, or of an equal share of rows and columns.

    Args:
        weight_OI: float8; leading dimensions are those of a stack.
        scale_RC: of any float dtype, or uint8 exponents; a single number is the scale of all.

    Raises:
        ModelError: the blocks of so many scales do not cover the weight.

    >>> weight_OI = torch.ones(2, 4).to(torch.float8_e4m3fn)
    >>> dequantize_fp8(weight_OI, torch.tensor([[0.5, 2.0]])).tolist()
    [[0.5, 0.5, 2.0, 2.0], [0.5, 0.5, 2.0, 2.0]]
    """
    scale = _exponents(scale_RC) if scale_RC.dtype == torch.uint8 else scale_RC.float()
    if scale.numel() > 1:
        for dim in (-2, -1):
            size, count = weight_OI.shape[dim], scale.shape[dim]
            block = BLOCK if -(-size // BLOCK) == count else max(size // count, 1)
            if -(-size // block) != count:
                raise ModelError(
                    f"found {tuple(scale.shape)} scales for {tuple(weight_OI.shape)} values; needed one for each block "
                    "of equal size; download the checkpoint again"
                )
            scale = scale.repeat_interleave(block, dim).narrow(dim, 0, size)
    return (weight_OI.float() * scale).to(DTYPE)


def dequantize_mxfp4(blocks_EOGH: Tensor, scales_EOG: Tensor) -> Tensor:
    """Values of four bits times powers of two, with inputs first, as GPT-OSS's stacks of experts have them: (E, I, O).

    Args:
        blocks_EOGH: uint8, two values each, the first in the lower bits.
        scales_EOG: uint8, exponents above -127.

    >>> blocks_EOGH = torch.tensor([[[[0x21, 0xA9]]]], dtype=torch.uint8)
    >>> dequantize_mxfp4(blocks_EOGH, torch.tensor([[[128]]], dtype=torch.uint8)).flatten().tolist()
    [1.0, 2.0, -1.0, -2.0]
    """
    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=torch.float32)
    *stack, rows, groups, size = blocks_EOGH.shape
    weight = torch.empty(*stack, groups * size * 2, rows, dtype=DTYPE)
    for index in range(len(blocks_EOGH)):  # one expert at a time, so that little memory is needed besides
        blocks_OGH, scale_OG1 = blocks_EOGH[index].int(), _exponents(scales_EOG[index]).unsqueeze(-1)
        both_OGH2 = torch.stack([values[blocks_OGH & 15], values[blocks_OGH >> 4]], -1)
        weight[index] = (both_OGH2.flatten(-2) * scale_OG1).flatten(-2).mT.to(DTYPE)
    return weight


def _exponents(scales: Tensor) -> Tensor:
    return (scales.float() - 127).exp2()


def _blocks_of(key: str) -> str:
    return f"{key.removesuffix(_SCALES)}{_BLOCKS}"
