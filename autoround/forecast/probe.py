"""How long a run takes: a few steps of a block at its true shape, timed on this machine and multiplied.

Legend: B samples in a batch, T tokens, D hidden size, N samples.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from autoround import func
from autoround.forecast.blank import BlankRun
from autoround.forecast.types import Seconds
from autoround.func import init, observe
from autoround.model.calls import CallTemplate
from autoround.model.read import read_block
from autoround.passes import at_once, gram_of, observed_rows
from autoround.precision import cast
from autoround.scales import scale_rows, used_rows
from autoround.schedule import make_optimizer
from autoround.spec import GgufSpec, QuantSpec
from autoround.tuner import lifted

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
    rounding = 0.0
    if weights and run.plan.specs:
        rounding = weights * _round_seconds(blank)
        if recipe.searches_clips:
            rounding += weights * _search_seconds(blank) * (COMPILED_SEARCH if compiled else 1)
    step = forward = hessians = moving = 0.0
    if learns:
        sample = _sample(blank)
        forward, step = _forward_seconds(sample), _step_seconds(sample) * (COMPILED_STEP if compiled else 1)
        if recipe.compensates:
            hessians, moving = _compensation_seconds(sample)
    observed = observed_rows(recipe, recipe.nsamples, stacked=False)
    passes = ((2 if recipe.iters else 1) * recipe.nsamples + observed) if blank.flows else 0
    count = len(run.plan.blocks)
    blocks = count * (recipe.iters * step + passes * forward + observed * hessians + moving) + rounding
    compiling = COMPILING if compiled else 0.0
    if learns and recipe.scale_steps:
        around += _scale_seconds(blank, sample, recipe.scale_steps, forward)
    return Seconds(step=step, block=blocks / max(count, 1), compiling=compiling, around=around,
                   total=around + compiling + blocks)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """The block in the middle with random weights, and how many rows of its are timed at once."""

    blank: BlankRun
    block_fn: func.BlockFn
    template: CallTemplate
    specs: Mapping[str, func.WeightSpec]
    weights: func.BlockWeights
    whole: dict[str, Tensor]
    rows: int

    def batch(self, rows: int) -> func.Batch:
        """Random hidden states of some rows, all of them valid."""
        run = self.blank.run
        hidden_BTD = torch.randn(rows, *self.blank.hidden, device=run.device).to(run.numerics.torch_dtype)
        call = self.template.bind(hidden_BTD, torch.zeros(rows, dtype=torch.int64))
        valid_BT = torch.ones(rows, run.recipe.seqlen, dtype=torch.bool, device=run.device)
        return func.Batch(call, hidden_BTD, valid_BT)


def _sample(blank: BlankRun) -> _Sample:
    run, index = blank.run, len(blank.run.plan.blocks) // 2
    block = run.plan.blocks[index]
    tensors = {name: _random(own, run.device) for name, own in read_block(blank.model, block.path).items()}
    return _Sample(
        blank=blank,
        block_fn=blank.block_fn(index),
        template=blank.templates[index],
        specs=block.specs,
        weights=func.split_tensors(tensors, block.specs),
        whole=cast(tensors, blank.dtypes),
        rows=min(_ROWS_AT_ONCE, run.recipe.nsamples),
    )


def _forward_seconds(sample: _Sample) -> float:
    """Seconds of a forward without gradients, for one row."""

    def forward() -> None:
        with torch.no_grad():
            for batch in _batches(sample):
                sample.block_fn(sample.whole, batch.call)

    return _timed(forward, sample.blank.run.device) / sample.rows


def _batches(sample: _Sample) -> list[func.Batch]:
    """Its rows, as many together as pass through a block."""
    hidden = torch.empty(sample.rows, *sample.blank.hidden, device="meta")
    together = at_once(torch.arange(sample.rows), sample.block_fn, hidden, sample.blank.run.device)
    return [sample.batch(len(rows_B)) for rows_B in together]


def _step_seconds(sample: _Sample) -> float:
    """Seconds of an uncompiled step. Its rows are other ones each time, as those of experts are."""
    run, recipe = sample.blank.run, sample.blank.run.recipe
    weights, fusion = sample.weights, func.fuse(sample.weights.tuned, sample.specs)
    optimizer = make_optimizer(recipe, fusion.specs)
    state = func.init_state(fusion.merge(func.init_params(weights.tuned)), optimizer, keep_best=recipe.keep == "best")
    weights = func.BlockWeights(fusion.merge(weights.tuned), cast(weights.frozen, sample.blank.dtypes))
    step = func.make_step(lifted(sample.block_fn, fusion, run.numerics), fusion.specs, optimizer,
                          dtype=run.numerics.torch_dtype)  # fmt: skip

    def once(rows: int) -> float:
        return _timed(lambda: step(weights, state, sample.batch(rows)), run.device)

    wanted = min(recipe.batch_size * recipe.gradient_accumulate_steps, recipe.nsamples)
    rows = min(wanted, _ROWS_AT_ONCE)
    found = once(rows)
    if wanted > rows:
        one = once(1)
        found = one + (found - one) / (rows - 1) * (wanted - 1)
    return found


def _compensation_seconds(sample: _Sample) -> tuple[float, float]:
    """Seconds of the Hessians for one row, and of compensation once they are there."""
    device, calls = sample.blank.run.device, [(batch.call, batch.valid_BT) for batch in _batches(sample)]

    def observed(gram: observe.Gram | None) -> observe.Observed:
        return observe.observe_inputs(sample.block_fn, sample.whole, calls, sample.specs, gram=gram)

    gram = gram_of(sample.blank.run.numerics.torch_dtype)
    with_them, without = (_timed(partial(observed, each), device) for each in (gram, None))
    found, params = observed(gram).hessians, func.init_params(sample.weights.tuned)
    start = time.perf_counter()
    moved = func.compensate(sample.weights.tuned, params, found, sample.specs)
    if not sample.blank.run.recipe.iters:
        refitted = {path: sample.weights.tuned[path] for path in found if func.refits(sample.specs[path])}
        codes = {path: func.quantize(moved[path], params[path], sample.specs[path]) for path in refitted}
        func.refit_scales(refitted, codes, found, sample.specs)
    _wait(device)
    return max(with_them - without, 0.0) / sample.rows, time.perf_counter() - start


def _scale_seconds(blank: BlankRun, sample: _Sample, steps: int, forward: float) -> float:
    """Seconds of tuning the scales of all blocks: the float model's pass, and steps; a head is as large as some blocks.

    Args:
        blank: the run.
        sample: its block in the middle.
        steps: how many.
        forward: seconds of a block for one row.
    """
    run, rows, specs = blank.run, scale_rows(blank.run.recipe), sample.specs
    codes = {path: func.quantize(own, func.nearest(own), specs[path]) for path, own in sample.weights.tuned.items()}
    rounded = func.RoundedBlock(codes, cast(sample.weights.frozen, blank.dtypes))
    factors, batch, settings = func.init_factors(codes), sample.batch(rows), {"dtype": run.numerics.torch_dtype}
    apply = func.make_apply(sample.block_fn, specs, **settings)
    pull = func.make_pull(sample.block_fn, specs, **settings, hidden=sample.template.hidden)

    def step() -> None:
        with torch.no_grad():
            output_BTD = apply(rounded, factors, batch.call)
        pull(rounded, factors, batch.call, output_BTD)

    count, weights = len(run.plan.blocks), sum(own.numel() for own in sample.whole.values())
    head: float = run.model.config.get_text_config().vocab_size * batch.target_BTD.shape[-1] / weights
    return steps * (count + head) * _timed(step, run.device) + used_rows(run.recipe) * count * forward


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
