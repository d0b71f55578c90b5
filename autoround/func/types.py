"""Tensors of the tuner, as NamedTuples so that torch treats them as pytrees.

Dimension suffixes used all over this package:
    O  output features    I  input features    G  groups in a row    S  columns in a group
    K  blocks of groups in a row (GGUF types)
    N  samples            B  samples in a batch    T  tokens    D  hidden size
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor


class RoundingParams(NamedTuple):
    """What is tuned for one weight.

    Attributes:
        offset_OGS: float32 in [-0.5, 0.5], added to ``weight / scale`` before rounding.
        clip_min_OG: float32 in [0, 1], factor on each group's minimum.
        clip_max_OG: float32 in [0, 1], factor on each group's maximum.
    """

    offset_OGS: Tensor
    clip_min_OG: Tensor
    clip_max_OG: Tensor


class Prepared(NamedTuple):
    """A weight with the constants of its tuning run, computed once outside the step.

    Attributes:
        weight_OGS: float32, the weight with its rows split into groups.
        lo_OG: float32 <= 0, minimum of each group and zero.
        hi_OG: float32 >= 0, maximum of each group and zero.
    """

    weight_OGS: Tensor
    lo_OG: Tensor
    hi_OG: Tensor


class IntCodes(NamedTuple):
    """A quantized weight: ``weight = scale * (q - zero)``. All that exporters and journals receive.

    Attributes:
        q_OI: uint8 in [0, 2**bits - 1].
        scale_OG: the spec's scale dtype; negative values are legal on the symmetric grid.
        zero_OG: uint8 in [0, 2**bits - 1]; the constant 2**(bits-1) on the symmetric grid.
    """

    q_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor


class SymBlockCodes(NamedTuple):
    """A weight in symmetric GGUF blocks: ``weight = (d * scale) * (q - 2**(bits-1))``.

    Q3_K and Q6_K; with all scales 1 also Q4_0, Q5_0 and Q8_0.

    Attributes:
        q_OI: uint8 in [0, 2**bits - 1].
        scale_OG: int8 in [-2**(scale_bits-1), 2**(scale_bits-1) - 1].
        d_OK: float16 of either sign.
    """

    q_OI: Tensor
    scale_OG: Tensor
    d_OK: Tensor


class AsymBlockCodes(NamedTuple):
    """A weight in asymmetric GGUF blocks: ``weight = (d * scale) * q - (dmin * min)``.

    Q2_K, Q4_K and Q5_K; with all scales and minima 1 also Q4_1 and Q5_1, whose files hold ``m = -dmin``.

    Attributes:
        q_OI: uint8 in [0, 2**bits - 1].
        scale_OG: uint8 in [0, 2**scale_bits - 1].
        min_OG: uint8 in [0, 2**scale_bits - 1].
        d_OK: float16, >= 0.
        dmin_OK: float16, >= 0 for Q2_K, Q4_K and Q5_K.
    """

    q_OI: Tensor
    scale_OG: Tensor
    min_OG: Tensor
    d_OK: Tensor
    dmin_OK: Tensor


class Call(NamedTuple):
    """The arguments of one call of a block: positional and keyword, tensors or constants."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Batch(NamedTuple):
    """What one tuning step sees.

    Attributes:
        call: arguments for the block, hidden states included.
        target_BTD: output of the float block, any float dtype.
        valid_BT: bool, False for padding tokens, which do not count in the loss.
    """

    call: Call
    target_BTD: Tensor
    valid_BT: Tensor


class BlockWeights(NamedTuple):
    """All tensors of one block.

    Attributes:
        tuned: module path relative to the block -> prepared weight.
        frozen: parameter or buffer name relative to the block -> tensor, used as it is.
    """

    tuned: dict[str, Prepared]
    frozen: dict[str, Tensor]


Codes: TypeAlias = IntCodes | SymBlockCodes | AsymBlockCodes
Params: TypeAlias = dict[str, RoundingParams]
Tensors: TypeAlias = Mapping[str, Tensor]
BlockFunction: TypeAlias = Callable[[Tensors, Call], Tensor]


class TuneState(NamedTuple):
    """All state of a tuning run.

    Attributes:
        params: the current parameters.
        opt_state: state of the optimizer, as its ``init`` made it.
        best_params: parameters at the lowest loss seen; the initial ones until the first step.
        best_loss: 0-d float32, that loss; infinity until the first step.
        step: 0-d int64, updates done.
    """

    params: Params
    opt_state: Any
    best_params: Params
    best_loss: Tensor
    step: Tensor
