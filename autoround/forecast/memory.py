"""How much memory a run takes: its own tuner runs on tensors without data, and their bytes are counted.

Legend: N samples, T tokens, D hidden size.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from autoround import func
from autoround.activations import Inputs, Stream, copies, memory_for
from autoround.backends.base import Numerics
from autoround.forecast.blank import BlankRun, mapped
from autoround.forecast.count import ByteCount, without_data
from autoround.forecast.types import BlockNeed, Memory
from autoround.func import Codes, init, observe
from autoround.func.compensate import compensate
from autoround.model.finish import read_weight
from autoround.model.read import read_block
from autoround.recipe import Recipe
from autoround.scales import scale_rows, used_rows
from autoround.slots import SLOTS
from autoround.tuner import BlockTuner

# Resident memory for each byte of tensors in glibc's heap at the worst moment: what is freed between others stays.
# Fitted to whole runs, which differ among themselves; benchmarks/plan_accuracy.py compares.
CPU_KEPT = 2.4
# What oneDNN keeps in the heap for products of many sizes, as experts have them, in caches of the size that the command
# sets: what is in use there after a run of a mixture beyond what is after one of a dense model.
EXPERTS_CACHES = 60_000_000
# The same for all tensors of an accelerator's caching allocator, and its context; not measured.
DEVICE_KEPT, DEVICE_CONTEXT = 1.1, 500_000_000
# What reading text adds to a process: libraries for data sets, tokenizer, text: an estimate.
DATA_BYTES = 45_000_000
# What compiling a step and a search adds to a process: an estimate.
COMPILER_BYTES = 200_000_000
# Bytes for each byte of codes while scales are tuned: beside the codes, factors and their moments in float32, which are
# those of groups of 64.
SCALED_BYTES = 1.25
# Steps in which every kind of tensor that a step makes has been there.
_STEPS = 2


def memory_of(blank: BlankRun, process: int) -> Memory:
    """Count what a run will hold.

    Args:
        blank: the run.
        process: bytes of a process that has opened the model.

    Raises:
        AutoRoundError: whatever the tuner refuses by shapes alone.
    """
    run = blank.run
    blocks = tuple(_block_needs(blank))
    rows = _rows(blank).nbytes if blank.flows else 0
    on_device = run.device.type != "cpu"
    others, outside_codes = _others(blank)
    host = process + (DATA_BYTES if blank.templates else 0)
    host += COMPILER_BYTES if run.numerics.compiler else 0
    if blank.templates and not on_device and any(layer.shape.experts for layer in run.plan.layers.values()):
        host += round(CPU_KEPT * EXPERTS_CACHES)
    scales = _scales(blank, blocks)
    host += max([others, *(need.host + (0 if on_device else scales) for need in blocks)])
    if on_device:  # the next block, which is read ahead
        host += max((_stored(blank, index) for index in range(1, len(run.plan.blocks))), default=0)
    largest = max((need.device for need in blocks), default=0)
    device = DEVICE_CONTEXT + round(DEVICE_KEPT * (largest + scales))
    return Memory(process=process, activations=copies(run.recipe) * rows, slots=SLOTS * len(Stream._fields) * rows,
                  blocks=blocks, others=others, outside_codes=outside_codes, host=host,
                  device=device if on_device else 0)  # fmt: skip


def code_bytes(codes: Mapping[str, Codes]) -> int:
    """Bytes of codes in a journal."""
    return sum(tensor.nbytes for tensor in tree_iter(dict(codes)) if isinstance(tensor, Tensor))


def _scales(blank: BlankRun, blocks: Sequence[BlockNeed]) -> int:
    """Bytes that tuning the scales of all blocks holds beside what runs a block, which takes no more than tuning it."""
    recipe = blank.run.recipe
    if not recipe.scale_steps or not blank.templates:
        return 0
    codes = sum(len(need.paths) * need.codes for need in blocks)
    row = math.prod(blank.hidden) * blank.run.numerics.torch_dtype.itemsize
    flows = (len(blank.run.plan.blocks) + 1) * scale_rows(recipe) * row
    return round(SCALED_BYTES * codes) + flows + 2 * used_rows(recipe) * row


def _stored(blank: BlankRun, index: int) -> int:
    """Bytes of a block as it lies in the files."""
    return sum(tensor.nbytes for tensor in read_block(blank.model, blank.run.plan.blocks[index].path).values())


def _rows(blank: BlankRun) -> Tensor:
    """All rows that flow into a block, without data."""
    recipe = blank.run.recipe
    return torch.empty(recipe.nsamples, *blank.hidden, dtype=blank.run.numerics.torch_dtype, device="meta")


def _block_needs(blank: BlankRun) -> Iterator[BlockNeed]:
    """What each kind of block needs: blocks of equal signature, specs and tensors are of one kind."""
    kinds: dict[Any, list[int]] = {}
    for index, block in enumerate(blank.run.plan.blocks):
        shapes = tuple((layer.shape.out_features, layer.shape.in_features) for layer in block.layers)
        kinds.setdefault((blank.block_fn(index).signature, tuple(block.specs.items()), shapes), []).append(index)
    for members in kinds.values():
        host, device, codes = _tuned(blank, members[0])
        paths = tuple(blank.run.plan.blocks[index].path for index in members)
        yield BlockNeed(paths=paths, host=host, device=device, codes=codes)


def _tuned(blank: BlankRun, index: int) -> tuple[int, int, int]:
    """Tune a block without data: bytes at the worst moment on the host and on the device, and those of its codes.

    A few batches of rows show every kind of tensor; the other rows are added as often as they lie in memory; on the
    disk, none of them do.
    """
    run, block, home = blank.run, blank.run.plan.blocks[index], _home(blank)
    some = dataclasses.replace(run.recipe, nsamples=min(run.recipe.nsamples, 2 * _step_rows(run.recipe)))
    row = math.prod(blank.hidden) * run.numerics.torch_dtype.itemsize if blank.flows else 0
    with without_data(), ByteCount(CPU_KEPT) as count:
        there, all_rows = (count.resident(each.nsamples * row, home.type) for each in (some, run.recipe))
        missing = -there if run.place.on_disk else all_rows - there
        stored = read_block(blank.model, block.path)
        tensors = {name: _empty(tensor, run.device) for name, tensor in stored.items()}
        tuner = Countable(*_means(blank), on_step=lambda done, loss: None, dtypes=blank.dtypes)
        tuned = tuner.tune(index, blank.block_fn(index), tensors, block.specs, _inputs(blank, index, some.nsamples))
        codes = code_bytes(tuned.codes)
        del tuned
    count.peak[home.type] += copies(run.recipe) * missing
    return count.peak["cpu"], 0 if run.device.type == "cpu" else count.peak[run.device.type], codes


def _step_rows(recipe: Recipe) -> int:
    return recipe.batch_size * recipe.gradient_accumulate_steps


def _home(blank: BlankRun) -> torch.device:
    """Where rows live."""
    return blank.run.place.home


def _inputs(blank: BlankRun, index: int, rows: int) -> Inputs | None:
    """What flows into a block."""
    if not blank.flows:
        return None
    home, dtype = _home(blank), blank.run.numerics.torch_dtype
    counts = (rows if blank.run.recipe.iters else 0, rows)  # as the stream has them
    stream = Stream(*(torch.empty(count, *blank.hidden, dtype=dtype, device=home) for count in counts))
    valid_NT = torch.empty(rows, blank.run.recipe.seqlen, dtype=torch.bool, device=home)
    template = mapped(blank.templates[index], lambda tensor: _empty(tensor, home))
    return Inputs(template, stream, valid_NT, memory_for(blank.run.recipe, stream))


class Countable(BlockTuner):
    """The tuner but for what takes long and holds nothing by itself: most of the search, and rounding in turn."""

    _hessians: Mapping[str, Tensor] = MappingProxyType({})

    def _observe(self, *args: Any) -> observe.Observed:
        observed = super()._observe(*args)
        self._hessians = observed.hessians
        return observed._replace(hessians={})

    def _start(
        self, weights: func.BlockWeights, moments: Mapping[str, Tensor], specs: Mapping[str, func.WeightSpec]
    ) -> func.Params:
        """One slice of the search for every way to store a weight: others are as large."""
        start = func.init_params(weights.tuned)
        if self._recipe.searches_clips:
            for spec, path in {spec: path for path, spec in specs.items()}.items():
                init.search_clips(func.Prepared(*(field[:1] for field in weights.tuned[path])), None, spec)
        compensate(weights.tuned, start, self._hessians, specs, rounding=lambda columns, spec: None)
        self._hessians = {}
        return start


def _means(blank: BlankRun) -> tuple[Recipe, Numerics, list[torch.device]]:
    """What a tuner of few steps, uncompiled, is made with."""
    run = blank.run
    recipe = dataclasses.replace(run.recipe, iters=min(run.recipe.iters, _STEPS), compensate=run.recipe.compensates)
    return recipe, dataclasses.replace(run.numerics, compiler=None), [run.device]


def _others(blank: BlankRun) -> tuple[int, int]:
    """Bytes at the worst moment outside the blocks, and those of the codes that are made there."""
    run, source = blank.run, blank.model.source
    dtype, rows = run.numerics.torch_dtype, _rows(blank).nbytes if blank.flows else 0
    flows = 0 if run.place.on_disk else 2 * rows
    sizes = [math.prod(source.shape(name)) * source.dtype(name).itemsize for name in source.names()]
    read = 0
    for name in blank.outside:  # as stored, mapped, and once more where it is cast
        cast = dtype.itemsize if source.dtype(name) != dtype else 0
        read += math.prod(source.shape(name)) * (source.dtype(name).itemsize + cast)
    last = run.plan.parts[len(run.plan.blocks) :]
    ends = [_single(blank, path) for part in last for path in part.specs]
    return max([read + rows, *(flows + peak for peak, _ in ends), *sizes]), sum(codes for _, codes in ends)


def _single(blank: BlankRun, path: str) -> tuple[int, int]:
    """Bytes at the worst moment while a layer outside the blocks is quantized, and those of its codes."""
    run = blank.run
    with without_data(), ByteCount(CPU_KEPT) as count:
        weight_OI = _empty(read_weight(blank.model, path), run.device)
        recipe, numerics, devices = _means(blank)
        recipe = dataclasses.replace(recipe, clip_search=False)  # whose slices are small beside what is rounded at once
        tuner = BlockTuner(recipe, numerics, devices, on_step=lambda done, loss: None)
        codes = code_bytes({path: tuner.quantize_layer(path, weight_OI, run.plan.specs[path])})
    return count.peak[run.device.type], codes


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
