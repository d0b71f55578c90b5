"""What the loop around the steps costs: batches gathered, losses kept and told, the heap trimmed.

The first block of SmolLM2 (dithered) is tuned as the engine tunes it, with its progress meter; beside that, the same
compiled step is taken over one batch that is already gathered. Rounds of both alternate, in one process.

``python -m benchmarks.loop [--bits N] [--steps N] [--rounds N] [--folder FOLDER]`` on an idle machine.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from autoround import func
from autoround.activations import Inputs, Stream
from autoround.backends.base import Numerics, jit
from autoround.backends.cpu import CPU
from autoround.backends.host import settle_heap
from autoround.model.load import open_model
from autoround.precision import cast
from autoround.recipe import Recipe
from autoround.schedule import make_optimizer
from autoround.tuner import BlockTuner
from benchmarks import machine
from benchmarks.cells import DATA, GROUP_SIZE, Place
from benchmarks.stopping import BATCH, HOST, MODEL, Block, float_blocks
from benchmarks.sweep import read_texts

# Steps of a round that are not counted: the first ones find caches cold.
WARM_UP = 3
# Losses are read about as often as a meter that shows itself four times a second reads them.
TOLD = 2


def between(moments: list[float]) -> list[float]:
    """Seconds from each moment to the next."""
    return [later - earlier for earlier, later in pairwise(moments)]


def engine_steps(block: Block, recipe: Recipe, numerics: Numerics) -> Callable[[], list[float]]:
    """Tunes the block; seconds of each step, the loop's work with it."""
    moments: list[float] = []

    def told(done: int, loss: Callable[[], float]) -> None:
        if done % TOLD == 0:
            loss()
        moments.append(time.perf_counter())

    tuner = BlockTuner(recipe, numerics, [HOST], on_step=told)
    specs = dict.fromkeys(func.linear_paths(block.block_fn.skeleton), recipe.spec)
    valid_NT = torch.ones(block.x_NTD.shape[:2], dtype=torch.bool)

    def tune() -> list[float]:
        moments.clear()
        rows = Stream(block.x_NTD.clone(), block.x_NTD.clone())
        tuner.tune(0, block.block_fn, block.tensors, specs, Inputs(block.template, rows, valid_NT))
        return between(moments)[WARM_UP:]

    return tune


def bare_steps(block: Block, recipe: Recipe, numerics: Numerics) -> Callable[[], list[float]]:
    """Steps over one batch; seconds of each."""
    specs = dict.fromkeys(func.linear_paths(block.block_fn.skeleton), recipe.spec)
    weights, dtype = func.split_tensors(block.tensors, specs), numerics.torch_dtype
    fusion = func.fuse(weights.tuned, specs)
    optimizer = make_optimizer(recipe, fusion.specs)
    frozen = cast(weights.frozen, lambda name: dtype)
    step = jit(func.make_step(fusion.lift(block.block_fn), fusion.specs, optimizer, dtype=dtype), compiler="inductor")
    batch = block.batch(torch.arange(BATCH))
    merged = func.BlockWeights(fusion.merge(weights.tuned), frozen)
    start = fusion.merge(func.init_params(weights.tuned))

    def take() -> list[float]:
        state, moments = func.init_state(start, optimizer, keep_best=recipe.keep == "best"), [time.perf_counter()]
        for _ in range(recipe.iters):
            state, _ = step(merged, state, batch)
            moments.append(time.perf_counter())
        return between(moments)[WARM_UP:]

    return take


def main(words: list[str] | None = None) -> None:
    """Parse options, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=DATA[0], help="of calibration")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "autoround-bench")
    options = parser.parse_args(words)
    print(machine.describe(), flush=True)
    source, texts = read_texts(Place(folder=options.folder), MODEL, 0, tokens=4000)
    attention, dtype = CPU.attention(DATA[1]), CPU.compute_dtype()
    model = open_model(source, attn_implementation=attention)
    block = float_blocks(model, torch.tensor(texts.calibration[: options.rows]), [0], dtype)[0]
    recipe = Recipe(bits=options.bits, group_size=GROUP_SIZE, iters=options.steps, batch_size=BATCH)
    numerics = Numerics(device="cpu", dtype=str(dtype).removeprefix("torch."), attention=attention,
                        compiler="inductor", threads=torch.get_num_threads(), micro_batches=1)  # fmt: skip
    ways = {"engine": engine_steps(block, recipe, numerics), "bare": bare_steps(block, recipe, numerics)}
    ways["engine"](), ways["bare"]()  # compiles
    ratios = []
    for number in range(1, options.rounds + 1):
        engine, bare = (statistics.median(take()) for take in ways.values())
        ratios.append(engine / bare)
        print(
            f"round {number}: {1e3 * engine:.1f} ms a step in the engine's loop, {1e3 * bare:.1f} ms alone", flush=True
        )
    print(f"the loop adds {statistics.median(ratios) - 1:.1%} ({min(ratios) - 1:.1%} to {max(ratios) - 1:.1%})")


if __name__ == "__main__":
    settle_heap()  # as commands do
    main()
