"""What a block costs beside its steps, and what other ways to compute it would cost: SmolLM2's shapes, one batch.

``python -m benchmarks.parts [--rows N] [--seqlen N]`` prints milliseconds of each part, and what they come to over the
whole model for 128 rows. Where two ways are printed, the first is the one in use.

Legend: M tokens, I input features, B rows, T tokens in a row, D hidden size.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from autoround import func
from autoround.backends.base import jit, select
from autoround.backends.products import float32_products
from autoround.func import init
from autoround.func.observe import add_gram
from autoround.passes import CPU_TOKENS, at_once, gram_of
from benchmarks import machine
from benchmarks.step import make_block, parse

BLOCKS, ROWS, REPEATS = 30, 128, 5


def milliseconds(run: Callable[[], object]) -> float:
    """The least of a few runs, after one that does not count."""
    run()
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return 1e3 * min(taken)


def measured(rows: int, seqlen: int) -> list[tuple[str, float, bool]]:
    """Name, milliseconds, and whether it is done for every batch; else once a block."""
    backend, device = select("cpu")
    dtype = backend.compute_dtype()
    options = parse(["--batch", str(rows), "--seqlen", str(seqlen)])
    block_fn, tensors, batch, specs = make_block(options, device, dtype, backend.attention(seqlen))
    weights = func.split_tensors(tensors, specs)
    params = func.init_params(weights.tuned)
    own = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    compiled = jit(lambda tensors, call: block_fn(tensors, call), compiler=backend.compiler)
    inputs = {width: torch.randn(rows * seqlen, width).to(dtype) for width in (576, 1536)}
    hessians = {width: x_MI.float().T @ x_MI.float() for width, x_MI in inputs.items()}
    sums = {width: torch.zeros(width, width) for width in inputs}
    of_layers = {path: hessians[weight.weight_OGS[0].numel()] for path, weight in weights.tuned.items()}
    moments = {path: hessian_II.diagonal() for path, hessian_II in of_layers.items()}
    products = [(torch.randn(rows * seqlen, tensor.shape[1]).to(dtype), tensor.to(dtype).t())
                for tensor in tensors.values() if tensor.ndim == 2]  # fmt: skip

    def forward(function: Callable[..., Tensor], call: func.Call = batch.call) -> Callable[[], object]:
        return torch.no_grad()(lambda: function(own, call))

    together = at_once(torch.arange(rows), block_fn, torch.empty(rows, seqlen), device)
    calls = [tree_map(partial(_rows, rows_B, rows), batch.call) for rows_B in together]

    def grams(gram: Callable[[Tensor, Tensor], object]) -> Callable[[], object]:
        """Of the three inputs of the width of the block, and of the wide one, in parts as rows pass together."""
        return lambda: [gram(sums[width], x_MI) for width in (576, 576, 576, 1536)
                        for x_MI in inputs[width].split(CPU_TOKENS)]  # fmt: skip

    return [
        ("forward pass, some rows together", milliseconds(lambda: [forward(block_fn, call)() for call in calls]), True),
        ("  all rows of a batch at once", milliseconds(forward(block_fn)), True),
        ("  compiled", milliseconds(forward(compiled)), True),
        ("  its linear layers alone", milliseconds(lambda: [left @ right for left, right in products]), True),
        ("Hessians, upper tiles", milliseconds(grams(lambda sum_II, x_MI: gram_of(dtype)(sum_II, x_MI.float()))), True),
        ("  multiplied in float32", milliseconds(grams(lambda sum_II, x_MI: add_gram(sum_II, x_MI.float()))), True),
        ("  and whole", milliseconds(grams(lambda sum_II, x_MI: sum_II.addmm_(x_MI.float().T, x_MI.float()))), True),
        ("  in bfloat16, sums rounded", milliseconds(grams(lambda sum_II, x_MI: sum_II.add_(x_MI.T @ x_MI))), True),
        ("clip search", milliseconds(lambda: init.search_params(weights, moments, specs)), False),
        ("compensation", milliseconds(lambda: func.compensate(weights.tuned, params, of_layers, specs)), False),
        ("  two factors in float64 of each Hessian", milliseconds(lambda: [_two_factors(own_II) for own_II in
                                                                  (*[hessians[576]] * 3, hessians[1536])]), False),
    ]  # fmt: skip


def _rows(rows_B: Tensor, rows: int, leaf: Any) -> Any:
    """Of an argument that has as many rows as a batch."""
    return leaf[rows_B] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows else leaf


def _two_factors(hessian_II: Tensor) -> Tensor:
    damped_II = hessian_II.double()
    damped_II.diagonal().add_(0.01 * damped_II.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped_II)), upper=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="in a batch")
    parser.add_argument("--seqlen", type=int, default=256)
    options = parser.parse_args()
    print(machine.describe(), flush=True)
    print(f"{options.rows} x {options.seqlen} tokens a batch; seconds for {BLOCKS} blocks and {ROWS} rows")
    with float32_products(torch.device("cpu")):  # as runs have them
        found = measured(options.rows, options.seqlen)
    for name, taken, each_batch in found:
        seconds = taken * BLOCKS * (ROWS / options.rows if each_batch else 1) / 1e3
        print(f"{name:42} {taken:8.1f} ms {'a batch' if each_batch else 'a block'} {seconds:7.1f} s")


if __name__ == "__main__":
    main()
