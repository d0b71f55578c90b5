"""How long a run takes: a few steps of a block at its true shape, timed on this machine and multiplied.

Legend: B samples in a batch, T tokens, D hidden size, N samples.
"""

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from autoround import func
from autoround.forecast.blank import BlankRun
from autoround.forecast.types import Seconds
from autoround.func import init
from autoround.model.read import read_block
from autoround.schedule import make_optimizer
from autoround.spec import GgufSpec, QuantSpec
from autoround.tuner import cast, observed_rows

# A call is timed until this many seconds have passed, and at least once after one that is not counted.
_SECONDS = 0.4
# A step of more rows than these is timed with one row and with two, and drawn out.
_ROWS_AT_ONCE = 8
# Weights of which a search and a rounding are timed.
_WEIGHTS = 2**18
# On a CPU: time of a compiled step and search for that of an uncompiled one, and seconds that compiling takes;
# benchmarks/step.py and earlier whole runs gave them on two cores.
COMPILED_STEP, COMPILED_SEARCH, COMPILING = 0.75, 0.3, 30.0
# Bytes a second of reading, hashing, packing, writing and reading back: an estimate.
_BYTES_A_SECOND = 1.5e8
_START = 3.0


def seconds_of(blank: BlankRun, written: int) -> Seconds:
    """Time a block and multiply.

    Args:
        blank: the run.
        written: bytes of all files that it writes.

    Raises:
        AutoRoundError: the block cannot be run.
    """
    run, recipe = blank.run, blank.run.recipe
    source = run.model.source
    read = sum(math.prod(source.shape(name)) * source.dtype(name).itemsize for name in source.names())
    around = _START + (read + 2 * written) / _BYTES_A_SECOND
    compiled, learns = run.numerics.compiler is not None, bool(blank.templates)
    weights = sum(block.weights for block in run.plan.blocks)
    rounding = weights * _round_seconds(blank)
    if recipe.searches_clips:
        rounding += weights * _search_seconds(blank) * (COMPILED_SEARCH if compiled else 1)
    step = forward = 0.0
    if learns:
        step, forward = _step_seconds(blank)
        step *= COMPILED_STEP if compiled else 1
    observed = observed_rows(recipe, recipe.nsamples, stacked=False)
    passes, hessians, moving = (2 if recipe.iters else 1) * recipe.nsamples + observed, 0.0, 0.0
    if recipe.compensates:
        hessians, moving = _compensation_seconds(blank)
    count = len(run.plan.blocks)
    blocks = count * (recipe.iters * step + passes * forward + observed * hessians + moving) + rounding
    compiling = COMPILING if compiled else 0.0
    return Seconds(step=step, block=blocks / max(count, 1), compiling=compiling, around=around,
                   total=around + compiling + blocks)  # fmt: skip


def _step_seconds(blank: BlankRun) -> tuple[float, float]:
    """Seconds of an uncompiled step, and of a forward without gradients for one row; of the block in the middle."""
    run, recipe = blank.run, blank.run.recipe
    index = len(run.plan.blocks) // 2
    block, dtype = run.plan.blocks[index], run.numerics.torch_dtype
    stored = read_block(blank.model, block.path)
    tensors = {name: _random(tensor, run.device) for name, tensor in stored.items()}
    weights = func.split_tensors(tensors, block.specs)
    fusion = func.fuse(weights.tuned, block.specs)
    params = fusion.merge(func.init_params(weights.tuned))
    weights = func.BlockWeights(fusion.merge(weights.tuned), cast(weights.frozen, dtype))
    optimizer = make_optimizer(recipe, 4)
    block_fn = blank.block_fn(index)
    step = func.make_step(fusion.lift(block_fn), fusion.specs, optimizer, dtype=dtype)
    state = func.init_state(params, optimizer, keep_best=recipe.keep == "best")
    whole = cast(tensors, dtype)

    def once(rows: int) -> float:
        batch = _batch(blank, index, rows)
        return _timed(lambda: step(weights, state, batch), run.device)

    def forward() -> None:
        with torch.no_grad():
            block_fn(whole, _batch(blank, index, rows).call)

    wanted = min(recipe.batch_size * recipe.gradient_accumulate_steps, recipe.nsamples)
    rows = min(wanted, _ROWS_AT_ONCE)
    found = once(rows)
    if wanted > rows:
        one = once(1)
        found = one + (found - one) / (rows - 1) * (wanted - 1)
    return found, _timed(forward, run.device) / rows


def _compensation_seconds(blank: BlankRun) -> tuple[float, float]:
    """Seconds of the Hessians for one row, and of compensation once they are there; of the block in the middle."""
    run, index = blank.run, len(blank.run.plan.blocks) // 2
    block, block_fn, rows = run.plan.blocks[index], blank.block_fn(index), min(_ROWS_AT_ONCE, run.recipe.nsamples)
    stored = read_block(blank.model, block.path)
    tensors = {name: _random(tensor, run.device) for name, tensor in stored.items()}
    weights, whole = func.split_tensors(tensors, block.specs), cast(tensors, run.numerics.torch_dtype)
    batch = _batch(blank, index, rows)

    def observed(*, hessians: bool) -> init.Observed:
        return init.observe_inputs(block_fn, whole, [(batch.call, batch.valid_BT)], block.specs, hessians=hessians)

    with_them, without = (_timed(partial(observed, hessians=each), run.device) for each in (True, False))
    found, params = observed(hessians=True).hessians, func.init_params(weights.tuned)
    start = time.perf_counter()
    func.compensate(weights.tuned, params, found, block.specs)
    _wait(run.device)
    return max(with_them - without, 0.0) / rows, time.perf_counter() - start


def _batch(blank: BlankRun, index: int, rows: int) -> func.Batch:
    """Random hidden states of some rows, all of them valid."""
    run = blank.run
    hidden_BTD = torch.randn(rows, *blank.hidden, device=run.device).to(run.numerics.torch_dtype)
    call = blank.templates[index].bind(hidden_BTD, torch.zeros(rows, dtype=torch.int64))
    valid_BT = torch.ones(rows, run.recipe.seqlen, dtype=torch.bool, device=run.device)
    return func.Batch(call, hidden_BTD, valid_BT)


def _search_seconds(blank: BlankRun) -> float:
    """Seconds of the clip search for a weight."""
    prepared, spec = _prepared(blank)
    return _timed(partial(init.search_clips, prepared, None, spec), blank.run.device) / prepared.weight_OGS.numel()


def _round_seconds(blank: BlankRun) -> float:
    """Seconds of the final rounding for a weight."""
    prepared, spec = _prepared(blank)
    params = func.init_params({"": prepared})[""]
    return _timed(partial(func.quantize, prepared, params, spec), blank.run.device) / prepared.weight_OGS.numel()


def _prepared(blank: BlankRun) -> tuple[func.Prepared, QuantSpec | GgufSpec]:
    """Random weights of the most usual spec of the plan."""
    layers = [layer for layer in blank.run.plan.layers.values() if layer.spec is not None]
    usual = next((layer for layer in layers if layer.spec == blank.run.plan.spec), layers[0])
    assert usual.spec is not None
    columns = usual.shape.in_features
    weight_OI = torch.randn(max(1, _WEIGHTS // columns), columns, device=blank.run.device)
    return func.prepare(weight_OI, usual.spec), usual.spec


def _random(tensor: Tensor, device: torch.device) -> Tensor:
    """Values that keep a block's outputs finite."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    return (torch.randn(tensor.shape, device=device) * 0.02).to(tensor.dtype)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call."""
    work()
    _wait(device)
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < _SECONDS:
        work()
        _wait(device)
        calls += 1
    return (time.perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
