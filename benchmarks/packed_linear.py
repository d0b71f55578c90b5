"""Seconds of a packed 4-bit layer in groups of 128 on the CPU, against its dense and its wholly dequantized weight.

python -m benchmarks.packed_linear [--seconds N] [--shapes OxI …] [--rows M …] [--dtypes NAME …]

Legend: O output features, I input features, M rows of x.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autoround import func
from autoround.formats import gptq_layout
from autoround.formats.packed import PackedLinear
from autoround.func import IntCodes, QuantSpec
from benchmarks.machine import describe

SPEC = QuantSpec(bits=4, group_size=128)
SHAPES = ("576x1536", "2048x2048", "4096x11008")
ROWS = (1, 8, 32, 128, 512, 2048)
MOST_ROUNDS = 50
# Larger cases are left out: float16 takes half a minute for each round of them.
MOST_PRODUCTS = 2**35


class Variants(NamedTuple):
    """The same layer in three ways; each maps x (M, I) to (M, O).

    Attributes:
        dense: the weight in the dtype of x.
        whole: the weight is dequantized from the file's tensors at each call, then multiplied.
        ours: ``PackedLinear``.
    """

    dense: Callable[[Tensor], Tensor]
    whole: Callable[[Tensor], Tensor]
    ours: Callable[[Tensor], Tensor]


def make_variants(out_features: int, in_features: int, dtype: torch.dtype) -> Variants:
    """A random layer."""
    generator = torch.Generator().manual_seed(0)
    shape_OG = (out_features, in_features // SPEC.group_size)
    codes = IntCodes(
        q_OI=torch.randint(0, 16, (out_features, in_features), generator=generator, dtype=torch.uint8),
        scale_OG=(torch.rand(shape_OG, generator=generator) / 100).half(),
        zero_OG=torch.full(shape_OG, SPEC.midpoint, dtype=torch.uint8),
    )
    tensors = gptq_layout.pack_layer(codes, SPEC, zero_offset=0)
    packed, ours = (PackedLinear(tensors, zero_offset=0) for _ in range(2))
    ours.finish()
    dense_OI = func.dequantize(codes, SPEC).to(dtype)
    return Variants(
        dense=lambda x: nn.functional.linear(x, dense_OI),
        whole=lambda x: nn.functional.linear(x, _whole_weight(packed, dtype)),
        ours=ours.forward,
    )


def _whole_weight(packed: PackedLinear, dtype: torch.dtype) -> Tensor:
    weight_OI = packed.dequantize(0, packed.out_features).to(dtype).t()
    # torch's float16 product is 50 times slower on a weight that is transposed in memory than on a copy in order.
    return weight_OI.contiguous() if dtype == torch.float16 else weight_OI


def measure(variants: Variants, x: Tensor, seconds: float) -> list[float]:
    """Median seconds of each variant, then of ours by dense and ours by whole within a round.

    Variants take turns, so that other work on the machine hits all alike.
    """
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 3 or (time.perf_counter() < end and len(rounds) < MOST_ROUNDS):
        taken = []
        for run in variants:
            start = time.perf_counter()
            run(x)
            taken.append(time.perf_counter() - start)
        dense, whole, ours = taken
        rounds.append([*taken, ours / dense, ours / whole])
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row of the table")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16", "float16"))
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    print(f"{describe()}; {torch.get_num_threads()} threads")
    print(
        "milliseconds\n| shape | dtype | M | dense | whole | ours | ours / dense | ours / whole |\n" + "|---" * 8 + "|"
    )
    for shape in options.shapes:
        out_features, in_features = map(int, shape.split("x"))
        for name in options.dtypes:
            dtype = getattr(torch, name)
            variants = make_variants(out_features, in_features, dtype)
            for rows in (rows for rows in options.rows if out_features * in_features * rows <= MOST_PRODUCTS):
                x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
                *medians, by_dense, by_whole = measure(variants, x, options.seconds)
                times = " | ".join(f"{1e3 * seconds:.2f}" for seconds in medians)
                print(f"| {shape} | {name} | {rows} | {times} | {by_dense:.2f} | {by_whole:.2f} |", flush=True)


if __name__ == "__main__":
    main()
