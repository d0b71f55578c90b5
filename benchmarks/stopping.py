"""Whether blocks could stop early or lend steps to each other: held-out loss along schedules of several lengths.

Blocks of SmolLM2 (dithered), spread over its depth, are each tuned on what the float model gives them, with 25, 50, 100
and 200 steps at the recipe's rate, which falls linearly to zero. Rows that are never trained on are judged ten
times on the way. Early stopping would pay where the held-out loss stands still before the end; moving steps between
blocks would pay where some gain more than others by twice the steps.

``python -m benchmarks.stopping [--bits N …] [--steps N …] [--blocks N …] [--rows N] [--held N] [--folder FOLDER]``

Legend: N rows, B rows of a batch, T tokens, D hidden size.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoround import func
from autoround.backends.base import jit
from autoround.backends.cpu import CPU
from autoround.model.blocks import find_blocks
from autoround.model.calls import CallTemplate
from autoround.model.capture import capture
from autoround.model.load import OpenModel, open_model
from autoround.model.read import read_block
from autoround.precision import cast
from autoround.recipe import Recipe
from autoround.schedule import batch_rows, make_optimizer
from benchmarks import machine
from benchmarks.cells import DATA, Place
from benchmarks.sweep import GROUP_SIZE, read_texts

MODEL, LOOKS, BATCH = "smollm2-dithered", 10, 8
HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Block:
    """A block with its tensors, what flows into it, and what should come out."""

    block_fn: func.BlockFn
    tensors: Mapping[str, Tensor]
    template: CallTemplate
    x_NTD: Tensor
    y_NTD: Tensor

    def batch(self, rows_B: Tensor) -> func.Batch:
        """Rows with their targets; all tokens count."""
        valid_BT = torch.ones(len(rows_B), self.x_NTD.shape[1], dtype=torch.bool)
        return func.Batch(self.template.bind(self.x_NTD[rows_B], rows_B), self.y_NTD[rows_B], valid_BT)


def float_blocks(model: OpenModel, tokens_NT: Tensor, wanted: list[int], dtype: torch.dtype) -> dict[int, Block]:
    """The blocks in question, with what the float model gives them."""
    valid_NT = torch.ones_like(tokens_NT, dtype=torch.bool)
    x_NTD, templates = capture(model, tokens_NT, valid_NT, batch_size=BATCH, device=HOST, dtype=dtype)
    found = {}
    for index, path in enumerate(find_blocks(model.skeleton)[: max(wanted) + 1]):
        block_fn = func.make_block_fn(model.skeleton.get_submodule(path))
        tensors, template = read_block(model, path, device=HOST), templates[index]
        own = cast(tensors, lambda name: dtype)
        with torch.no_grad():
            parts = [block_fn(own, template.bind(x_NTD[rows_B], rows_B))
                     for rows_B in torch.arange(len(x_NTD)).split(BATCH)]  # fmt: skip
        y_NTD = torch.cat(parts)
        if index in wanted:
            found[index] = Block(block_fn, tensors, template, x_NTD, y_NTD)
        x_NTD = y_NTD
    return found


class Trial:
    """Tuning for so many steps at so many bits; one compiled step for all blocks."""

    def __init__(self, bits: int, steps: int) -> None:
        self._recipe = Recipe(bits=bits, group_size=GROUP_SIZE, iters=steps)
        self._step: Any = None

    def held_losses(self, block: Block, held: int) -> Tensor:
        """A block's loss on its first rows, which are held out: before the first step, then ten times on the way."""
        dtype, rows = block.x_NTD.dtype, torch.arange(len(block.x_NTD))
        specs = dict.fromkeys(func.linear_paths(block.block_fn.skeleton), self._recipe.spec)
        weights = func.split_tensors(block.tensors, specs)
        weights = weights._replace(frozen=cast(weights.frozen, lambda name: dtype))
        fusion = func.fuse(weights.tuned, specs)
        lifted = fusion.lift(block.block_fn)
        seen = [(one.call, one.valid_BT) for one in map(block.batch, rows[held : 2 * held].split(BATCH))]
        moments = func.second_moments(block.block_fn, cast(block.tensors, lambda name: dtype), seen, list(specs))
        start = func.search_params(weights, moments, specs)
        optimizer = make_optimizer(self._recipe, fusion.specs)
        state = func.init_state(fusion.merge(start), optimizer, keep_best=False)
        merged = weights._replace(tuned=fusion.merge(weights.tuned))
        if self._step is None:
            make = func.make_step(lifted, fusion.specs, optimizer, dtype=dtype)
            self._step = jit(make, compiler="inductor")

        def judge() -> Tensor:
            tensors = func.block_weights(merged, state.params, fusion.specs, dtype)
            with torch.no_grad():
                losses = [func.mse(lifted(tensors, one.call), one.target_BTD, one.valid_BT)
                          for one in map(block.batch, rows[:held].split(BATCH))]  # fmt: skip
            return torch.stack(losses).mean()

        found, steps = [judge()], self._recipe.iters
        looks = {round(steps * (look + 1) / LOOKS) for look in range(LOOKS)}
        for done, rows_B in enumerate(batch_rows(0, 0, len(rows) - held, BATCH, steps), start=1):
            state, _ = self._step(merged, state, block.batch(rows_B + held))
            if done in looks:
                found.append(judge())
        return torch.stack(found)


def main(words: list[str] | None = None) -> None:
    """Parse options, tune and print: every loss as a part of the start's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 2])
    parser.add_argument("--steps", nargs="+", type=int, default=[25, 50, 100, 200], help="lengths of schedules")
    parser.add_argument("--blocks", nargs="+", type=int, default=[0, 7, 15, 22, 29])
    parser.add_argument("--rows", type=int, default=DATA[0], help="of calibration, held-out ones among them")
    parser.add_argument("--held", type=int, default=32, help="rows that are never trained on")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "autoround-bench")
    options = parser.parse_args(words)
    print(machine.describe(), flush=True)
    source, texts = read_texts(Place(folder=options.folder), MODEL, 0, tokens=4000)
    dtype = CPU.compute_dtype()
    model = open_model(source, attn_implementation=CPU.attention(DATA[1]))
    tokens_NT = torch.tensor(texts.calibration[: options.rows])
    blocks = float_blocks(model, tokens_NT, options.blocks, dtype)
    print("held-out loss at tenths of the schedule, 1 is before the first step")
    for bits in options.bits:
        for steps in options.steps:
            trial = Trial(bits, steps)
            for index, block in blocks.items():
                found = trial.held_losses(block, options.held)
                row = " ".join(f"{one:.3f}" for one in (found / found[0])[1:].tolist())
                print(f"{bits} bits, {steps:3} steps, block {index:2}: {row}", flush=True)


if __name__ == "__main__":
    main()
