"""How one weight is stored: as integers with a scale per group, or in the blocks of a GGUF type. Torch-free."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from autoround.errors import UsageError

BITS = (2, 3, 4, 8)
WHOLE_ROW = -1
SCALE_DTYPES = {"float16": "float16", "fp16": "float16", "bfloat16": "bfloat16", "bf16": "bfloat16",
                "float32": "float32", "fp32": "float32"}  # fmt: skip
# Smallest |scale|: 1e-5 rounded to the scale's own dtype, so that a clamped scale is stored exactly.
SCALE_FLOOR = {
    "float16": 1.00135803222656250e-05,
    "bfloat16": 1.00135803222656250e-05,
    "float32": 9.999999747378752e-06,
}

_SCHEME = re.compile(r"W(?P<bits>\d+)A16(?:G(?P<group>-?\d+))?(?P<asym>_?ASYM)?", re.IGNORECASE)


class _Codes:
    """What follows from the width of a code."""

    __slots__ = ()
    bits: int

    @property
    def code_max(self) -> int:
        """Largest unsigned code, ``2**bits - 1``."""
        return (1 << self.bits) - 1

    @property
    def midpoint(self) -> int:
        """What symmetric codes are relative to, ``2**(bits-1)``."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec(_Codes):
    """Storage of one weight as integer codes with a scale and a zero point per group.

    Attributes:
        bits: width of a code, one of 2, 3, 4, 8.
        group_size: consecutive input columns that share a scale, or -1 for a whole row.
        sym: True for the symmetric full-range grid (zero point fixed at ``2**(bits-1)``, signed scales),
            False for the asymmetric grid (zero point per group, positive scales).
        scale_dtype: dtype in which scales are stored: "float16", "bfloat16" or "float32".
        zero_min: smallest zero point the file can hold (1 for GPTQ v1 files, which store ``zero - 1``).

    Raises:
        UsageError: a value outside these ranges.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    scale_dtype: str = "float16"
    zero_min: int = 0

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"bits: found {self.bits}; needed one of {', '.join(map(str, BITS))}")
        if self.group_size != WHOLE_ROW and self.group_size < 1:
            raise UsageError(
                f"group_size: found {self.group_size}; needed a positive number such as 32, 64 or 128, "
                "or -1 for one group per row"
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise UsageError(f"scale_dtype: found {self.scale_dtype!r}; needed one of {', '.join(SCALE_DTYPES)}")
        object.__setattr__(self, "scale_dtype", SCALE_DTYPES[self.scale_dtype])
        if not 0 <= self.zero_min <= 1:
            raise UsageError(f"zero_min: found {self.zero_min}; needed 0 or 1")

    @property
    def block_groups(self) -> int:
        """Groups that are stored together: each is on its own."""
        return 1

    @property
    def scale_floor(self) -> float:
        """Smallest magnitude of a scale, exact in ``scale_dtype``."""
        return SCALE_FLOOR[self.scale_dtype]

    def group_of(self, in_features: int) -> int:
        """Columns per group of a row with ``in_features`` columns.

        Raises:
            UsageError: the row does not split into whole groups.

        >>> QuantSpec(bits=4, group_size=-1).group_of(576)
        576
        """
        if self.group_size == WHOLE_ROW:
            return in_features
        if in_features % self.group_size:
            fitting = [size for size in (32, 64, 128) if in_features % size == 0]
            advice = f"use {' or '.join(map(str, fitting))}" if fitting else "use -1"
            raise UsageError(f"in_features {in_features} is not a multiple of group_size {self.group_size}; {advice}")
        return self.group_size

    @classmethod
    def parse(cls, text: str) -> "QuantSpec":
        """Read a scheme name: ``W<bits>A16``, then optionally ``G<group_size>`` and ``ASYM``; any case.

        Raises:
            UsageError: the text is not such a name.

        >>> QuantSpec.parse("w2a16g64")
        QuantSpec(bits=2, group_size=64, sym=True, scale_dtype='float16', zero_min=0)
        """
        match = _SCHEME.fullmatch(text.strip())
        if match is None:
            raise UsageError(
                f"scheme: found {text!r}; needed W2A16, W3A16, W4A16 or W8A16, optionally with a group size "
                "and ASYM as in W4A16G64 or W4A16G32_ASYM"
            )
        spec = cls(bits=int(match["bits"]), sym=match["asym"] is None)
        return spec if match["group"] is None else replace(spec, group_size=int(match["group"]))

    def __str__(self) -> str:
        group = "" if self.group_size == WHOLE_ROW else str(self.group_size)
        return f"W{self.bits}A16G{group or -1}{'' if self.sym else '_ASYM'}"


class BlockLayout(NamedTuple):
    """What the blocks of a GGUF type hold.

    Attributes:
        bits: width of a code.
        group_size: consecutive columns that share a scale.
        groups: in a block.
        sym: codes are relative to ``2**(bits-1)``; otherwise every group has a minimum.
        scale_bits: width of a group's scale and minimum, which the block's float16 factors multiply; signed if
            symmetric; 0 where a block is one group and the factors are all there is.
        nbytes: size of a block in the file.
    """

    bits: int
    group_size: int
    groups: int
    sym: bool
    scale_bits: int
    nbytes: int


# llama.cpp's k-quants and the types before them (ggml-common.h).
GGUF_TYPES: Mapping[str, BlockLayout] = MappingProxyType({
    "q4_0": BlockLayout(4, 32, 1, True, 0, 18),
    "q4_1": BlockLayout(4, 32, 1, False, 0, 20),
    "q5_0": BlockLayout(5, 32, 1, True, 0, 22),
    "q5_1": BlockLayout(5, 32, 1, False, 0, 24),
    "q8_0": BlockLayout(8, 32, 1, True, 0, 34),
    "q2_k": BlockLayout(2, 16, 16, False, 4, 84),
    "q3_k": BlockLayout(3, 16, 16, True, 6, 110),
    "q4_k": BlockLayout(4, 32, 8, False, 6, 144),
    "q5_k": BlockLayout(5, 32, 8, False, 6, 176),
    "q6_k": BlockLayout(6, 16, 16, True, 8, 210),
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufSpec(_Codes):
    """Storage of one weight in blocks of a GGUF type.

    Attributes:
        type: one of ``GGUF_TYPES``.

    Raises:
        UsageError: another type.

    >>> GgufSpec(type="q4_k").layout.group_size
    32
    """

    type: str

    def __post_init__(self) -> None:
        if self.type not in GGUF_TYPES:
            raise UsageError(f"GGUF type: found {self.type!r}; needed one of {', '.join(GGUF_TYPES)}")

    @property
    def layout(self) -> BlockLayout:
        """What its blocks hold."""
        return GGUF_TYPES[self.type]

    @property
    def bits(self) -> int:  # type: ignore[override]  # it is never set
        """Width of a code."""
        return self.layout.bits

    @property
    def group_size(self) -> int:
        """Consecutive columns that share a scale."""
        return self.layout.group_size

    @property
    def sym(self) -> bool:
        """Whether codes are relative to a midpoint."""
        return self.layout.sym

    @property
    def block_groups(self) -> int:
        """Groups that are stored together, in a block."""
        return self.layout.groups

    @property
    def level_range(self) -> tuple[int, int]:
        """Least and greatest integer scale, or minimum, of a group; both are 1 where a block is one group."""
        bits = self.layout.scale_bits
        if not bits:
            return 1, 1
        return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if self.sym else (0, (1 << bits) - 1)

    @property
    def block_columns(self) -> int:
        """Columns of a block: 32 or 256."""
        return self.layout.group_size * self.layout.groups

    def group_of(self, in_features: int) -> int:
        """Columns per group of a row with ``in_features`` columns.

        Raises:
            UsageError: the row does not split into whole blocks.
        """
        if in_features % self.block_columns:
            raise UsageError(f"in_features {in_features} is not a multiple of {self.block_columns}, a block of {self}")
        return self.layout.group_size

    def __str__(self) -> str:
        return self.type.upper()


WeightSpec: TypeAlias = QuantSpec | GgufSpec


def spec_of(settings: Mapping[str, Any]) -> WeightSpec:
    """The spec that ``dataclasses.asdict`` made settings of.

    >>> spec_of({"type": "q4_k"})
    GgufSpec(type='q4_k')
    """
    return GgufSpec(**settings) if "type" in settings else QuantSpec(**settings)
