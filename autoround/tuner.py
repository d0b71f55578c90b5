"""One block after another on a device: targets, start, tuning, codes, and what flows into the next block.

Everything numeric happens in ``autoround.func``; here its functions meet devices, batches and the recipe.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoround import func
from autoround.activations import Inputs, Stream
from autoround.backends.base import Numerics, jit
from autoround.backends.host import KEPT_BYTES, release_heap, trim_heap
from autoround.beside import beside
from autoround.coverage import STARVED_TOKENS
from autoround.errors import AutoRoundError
from autoround.func import init, observe
from autoround.func.experts import also_in_turn, restored
from autoround.func.slices import CPU_WEIGHTS
from autoround.func.types import BlockFunction
from autoround.passes import Passes, bound, evened, gram_of, observed_rows, replicas, taken
from autoround.placement import SpreadFn, sharers
from autoround.precision import Dtypes, cast
from autoround.ranks import ALONE, Ranks, owners_by_size, summed
from autoround.recipe import Recipe
from autoround.schedule import batch_rows, make_optimizer

# Weights of a single layer that are quantized at a time.
LAYER_ELEMENTS = 2**23
# Steps after which a host's heap is trimmed again: the pieces that steps free leave holes, which grow.
TRIMMED_STEPS = 10


class Tuned(NamedTuple):
    """Outcome of one block.

    Attributes:
        codes: layer path relative to the block -> codes.
        losses_K: float32, loss of every step.
        stream: what flows into the next block; None where nothing flowed in, or the block is tuned apart.
        tokens: module of experts -> int64 (E,), tokens that each of its experts took.
    """

    codes: dict[str, func.Codes]
    losses_K: Tensor
    stream: Stream | None
    tokens: Mapping[str, Tensor] = MappingProxyType({})


class BlockTuner:
    """Tunes blocks by one recipe; blocks of equal structure share one compiled step.

    Args:
        recipe: the settings.
        numerics: dtype and whether to compile.
        devices: where blocks run; rows may live elsewhere. Of several, each computes its share of the rows, and the
            first one does the rest, but for blocks that are spread over them.
        on_step: called with (steps done, loss reader) after every step.
        ranks: processes that tune the same blocks, each with one device, and share the rows.
        dtypes: those of a block's tensors by name; that of ``numerics`` for all when None.
    """

    def __init__(
        self,
        recipe: Recipe,
        numerics: Numerics,
        devices: Sequence[torch.device],
        *,
        on_step: Callable[[int, Callable[[], float]], None],
        ranks: Ranks = ALONE,
        dtypes: Dtypes | None = None,
    ) -> None:
        self._recipe, self._numerics, self._devices = recipe, numerics, devices
        self._dtype, self._ranks = numerics.torch_dtype, ranks
        self._dtypes = dtypes or (lambda name: self._dtype)
        self._on_step = lambda done, loss: on_step(done, loss.item)
        self._passes = Passes(batch_size=recipe.batch_size, devices=devices, ranks=ranks)
        self._compiled: dict[Any, Any] = {}

    def tune(
        self,
        index: int,
        block_fn: func.BlockFn,
        tensors: Mapping[str, Tensor],
        specs: Mapping[str, func.WeightSpec],
        inputs: Inputs | None,
    ) -> Tuned:
        """Quantize one block.

        Args:
            index: its place in call order; with the recipe's seed it decides the batches.
            block_fn: the lifted block, maybe one that is spread over devices.
            tensors: all its parameters and buffers, on the first device or where it computes; linear weights (O, I).
            specs: layer path relative to the block -> how its weight is stored.
            inputs: None quantizes each layer by itself.

        Raises:
            AutoRoundError: a weight or a loss is not finite, or a group size does not fit; names the layer.
        """
        if inputs is None:
            nearest = {path: self.quantize_layer(path, tensors[f"{path}.weight"], own) for path, own in specs.items()}
            return Tuned(nearest, torch.zeros(0), None)
        weights = func.split_tensors(tensors, specs)
        weights = weights._replace(frozen=cast(weights.frozen, self._dtypes))
        fusion, float_tensors = func.fuse(weights.tuned, specs), cast(tensors, self._dtypes)
        compiled = self._compile_ahead(index, block_fn, fusion, weights, inputs)
        target_NTD = torch.empty(0) if inputs.target_NTD is None else inputs.target_NTD
        if self._recipe.iters and inputs.target_NTD is None:
            room = partial(inputs.empty, "float_NTD")
            target_NTD = self._passes.outputs(block_fn, float_tensors, inputs.template, inputs.stream.float_NTD, room)
        observed = self._observe(block_fn, float_tensors, specs, inputs)
        tokens, trained_fn, aim_NTD = observed.tokens, block_fn, target_NTD
        if self._recipe.starved_experts == "route_all" and (starved := _starved(tokens)):
            trained_fn, turns = also_in_turn(block_fn, starved)
            weights = weights._replace(frozen={**weights.frozen, **turns})
            float_tensors |= turns
            observed = self._observe(trained_fn, float_tensors, specs, inputs)
            if self._recipe.iters:
                room = partial(inputs.empty, "aim_NTD")
                x_NTD = inputs.stream.float_NTD
                aim_NTD = self._passes.outputs(trained_fn, float_tensors, inputs.template, x_NTD, room)
        compiled()  # the search compiles too, and torch compiles one thing at a time
        start = _without_offsets(self._start(weights, observed.moments, specs))
        tuned = func.compensate(weights.tuned, start, observed.hessians, specs)
        refitted = [] if self._recipe.iters else [path for path in observed.hessians if func.refits(specs[path])]
        floats = {path: weights.tuned[path] for path in refitted}  # where steps are taken, clips decide the scales
        weights = weights._replace(tuned=fusion.merge(tuned))
        del float_tensors, tuned
        result = self._take_steps(trained_fn, fusion, weights, start, partial(self._batches, index, inputs, aim_NTD))
        del aim_NTD
        trim_heap()  # of what steps freed, before passes take more
        found = restored(fusion.split(result.params), start, _starved(observed.tokens))
        codes = _quantize(fusion.split(weights.tuned), found, specs)
        codes |= func.refit_scales(floats, codes, observed.hessians, specs)
        floats, observed = {}, observed._replace(hessians={})
        if inputs.target_NTD is not None:
            return Tuned(codes, result.losses_K, None, tokens)
        rounded = {f"{path}.weight": func.dequantize(own, specs[path]).to(self._dtype) for path, own in codes.items()}
        quantized = {**weights.frozen, **rounded}
        room = partial(inputs.empty, "quantized_NTD")
        quantized_NTD = self._passes.outputs(block_fn, quantized, inputs.template, inputs.stream.quantized_NTD, room)
        return Tuned(codes, result.losses_K, Stream(target_NTD, quantized_NTD), tokens)

    def quantize_layer(
        self, path: str, weight_OI: Tensor, spec: func.WeightSpec, moment_I: Tensor | None = None
    ) -> func.Codes:
        """Quantize one layer by itself, some rows at a time: with the clips that the search finds, or to nearest.

        Args:
            path: for messages.
            weight_OI: its weight, on the first device.
            spec: how it is stored.
            moment_I: mean square of its inputs; all columns count alike when None.

        Raises:
            AutoRoundError: the weight is not finite or a group size does not fit; names the layer.
        """
        specs, moments = {path: spec}, {} if moment_I is None else {path: moment_I}
        parts, small = [], weight_OI.device.type == "cpu" and not self._recipe.searches_clips
        for rows_OI in weight_OI.split(max(1, (CPU_WEIGHTS if small else LAYER_ELEMENTS) // weight_OI.shape[1])):
            weights = func.split_tensors({f"{path}.weight": rows_OI}, specs)
            params = func.init_params(weights.tuned)
            if self._recipe.searches_clips:
                params = init.search_params(weights, moments, specs, errors=self._errors)
            parts.append(_quantize(weights.tuned, params, specs)[path])
        return type(parts[0])(*(torch.cat(fields) for fields in zip(*parts, strict=True)))

    def _observe(
        self,
        block_fn: func.BlockFn,
        tensors: Mapping[str, Tensor],
        specs: Mapping[str, func.WeightSpec],
        inputs: Inputs,
    ) -> observe.Observed:
        """What the block's layers are given, as far as the recipe asks."""
        stacked = any(f"{path}.weight" in block_fn.stacks for path in specs)
        rows = observed_rows(self._recipe, len(inputs.valid_NT), stacked=stacked)
        gram, parts = gram_of(self._dtype) if self._recipe.compensates else None, self._numerics.micro_batches
        return self._passes.observe(block_fn, tensors, specs, inputs, rows=rows, gram=gram, parts=parts)

    def _start(
        self, weights: func.BlockWeights, moments: Mapping[str, Tensor], specs: Mapping[str, func.WeightSpec]
    ) -> func.Params:
        """Parameters before the first step; ranks search some layers each."""
        if not self._recipe.searches_clips:
            return func.init_params(weights.tuned)
        owner = owners_by_size({path: own.weight_OGS.numel() for path, own in weights.tuned.items()}, self._ranks.size)
        mine = {path: own for path, own in weights.tuned.items() if owner[path] == self._ranks.rank}
        found = init.search_params(weights._replace(tuned=mine), moments, specs, errors=self._errors)
        others = {path: own for path, own in weights.tuned.items() if path not in mine}
        found |= func.init_params(others)
        start = {path: found[path] for path in weights.tuned}
        clips = [(owner[path], clip) for path, (_, *ends) in start.items() for clip in ends]
        self._ranks.share([each for each, _ in clips], [clip for _, clip in clips])
        return start

    def _errors(
        self, weight_NS: Tensor, scale_CN: Tensor, shift_CN: Tensor, moment_NS: Tensor, spec: func.WeightSpec
    ) -> Tensor:
        """``rounding_errors``, compiled apart for each size and device: torch compiles a function a few times only."""
        key = ("rounding_errors", weight_NS.shape, weight_NS.device)
        errors = self._once(key, lambda: init.rounding_errors, self._numerics.compiler)
        error_CN: Tensor = errors(weight_NS, scale_CN, shift_CN, moment_NS, spec)
        return error_CN

    def _compile_ahead(
        self, index: int, block_fn: func.BlockFn, fusion: func.Fusion, weights: func.BlockWeights, inputs: Inputs
    ) -> Callable[[], object]:
        """Compile the step, if it is the first of its kind, while the block's other passes go on; what waits for it.

        A step is taken on a copy of the block, which nobody else calls, and thrown away.
        """
        places, key = self._places(block_fn), self._key(block_fn, fusion)
        idle = self._compiler(block_fn) is None or not self._recipe.iters or not weights.tuned
        idle |= "carried" in vars(block_fn.skeleton)  # what comes out may be wider than what stands in for targets
        if idle or len(places) > 1 or ("step", *key) in self._compiled:
            return lambda: None
        step = self._step(func.make_block_fn(block_fn.skeleton), fusion, key)
        own = weights._replace(tuned=fusion.merge(weights.tuned))
        state = self._state(fusion.merge(func.init_params(weights.tuned)), fusion)
        ((batch,), *_) = self._batches(index, inputs, inputs.stream.quantized_NTD, places, steps=1)

        def compile_step() -> None:
            torch.set_num_threads(self._numerics.threads)  # compiled code is for so many
            step(own, state, batch)
            release_heap()  # of the compiler

        return beside(compile_step)

    def _take_steps(
        self,
        block_fn: func.BlockFn,
        fusion: func.Fusion,
        weights: func.BlockWeights,
        start: func.Params,
        batches: Callable[[Sequence[torch.device]], Iterator[list[func.Batch]]],
    ) -> func.TuneResult:
        """All steps of a block, each over one batch, or over micro-batches that the devices share."""
        if not start:  # all its layers are kept
            return func.TuneResult(start, torch.zeros(0))
        key, places = self._key(block_fn, fusion), self._places(block_fn)
        own: Any = weights
        rows: Iterator[Any] = batches(places)
        if len(places) == 1:
            step = self._step(block_fn, fusion, key)
            rows = (batch for (batch,) in rows)
        else:
            fused = lifted(block_fn, fusion, self._numerics)
            make = partial(func.make_gradient, fused, fusion.specs, dtype=self._dtype)
            compiler, optimizer = self._compiler(block_fn), self._optimizer(fusion)
            gradients = [self._once(("gradient", device, *key), make, compiler) for device in places]
            update = self._once(("update", *key), partial(func.make_update, optimizer, fusion.specs), compiler)
            copies = replicas(weights, places)
            step = func.accumulate(gradients, update, total=partial(summed, self._ranks))
            own = [copies[device] for device in places]
        # no name holds the first state, so that it goes with the first step
        return func.tune_block(step, own, self._state(fusion.merge(start), fusion), rows, on_step=self._stepped)

    def _stepped(self, step: int, loss: Tensor) -> None:
        if step % TRIMMED_STEPS == 0 and self._devices[0].type == "cpu":
            trim_heap(KEPT_BYTES)
        self._on_step(step, loss)

    def _key(self, block_fn: func.BlockFn, fusion: func.Fusion) -> tuple[Any, ...]:
        """Equal for blocks that share compiled functions."""
        return (block_fn.signature, *fusion.specs.items(), *fusion.members.items())

    def _optimizer(self, fusion: func.Fusion) -> func.Transform:
        return make_optimizer(self._recipe, fusion.specs)

    def _state(self, params: func.Params, fusion: func.Fusion) -> func.TuneState:
        return func.init_state(params, self._optimizer(fusion), keep_best=self._recipe.keep == "best")

    def _step(self, block_fn: func.BlockFn, fusion: func.Fusion, key: tuple[Any, ...]) -> Any:
        fused, optimizer = lifted(block_fn, fusion, self._numerics), self._optimizer(fusion)
        make = partial(func.make_step, fused, fusion.specs, optimizer, dtype=self._dtype)
        return self._once(("step", *key), make, self._compiler(block_fn))

    def _places(self, block_fn: func.BlockFn) -> list[torch.device]:
        """The device of each micro-batch of a step: neighbours share one."""
        parts, devices = self._numerics.micro_batches, sharers(block_fn, self._devices)
        return [devices[part * len(devices) // parts] for part in range(parts)]

    def _compiler(self, block_fn: func.BlockFn) -> str | None:
        """A block that is spread over devices runs uncompiled."""
        return None if isinstance(block_fn, SpreadFn) else self._numerics.compiler

    def _once(self, key: Any, make: Callable[[], Any], compiler: str | None) -> Any:
        """A function made, and compiled, once per key for the whole run."""
        if key not in self._compiled:
            self._compiled[key] = jit(make(), compiler=compiler)
        return self._compiled[key]

    def _batches(
        self, index: int, inputs: Inputs, target_NTD: Tensor, places: Sequence[torch.device], steps: int | None = None
    ) -> Iterator[list[func.Batch]]:
        """The micro-batches of every step, on the devices that ``places`` names."""
        recipe = self._recipe

        def batch(rows_B: Tensor, device: torch.device) -> func.Batch:
            call = bound(inputs.template, inputs.stream.quantized_NTD, rows_B, device)
            target_BTD, valid_BT = (taken(each, rows_B).to(device) for each in (target_NTD, inputs.valid_NT))
            return func.Batch(call, target_BTD, valid_BT)

        size = recipe.batch_size * recipe.gradient_accumulate_steps
        for rows in batch_rows(recipe.seed, index, len(inputs.valid_NT), size, steps or recipe.iters):
            yield [batch(*part) for part in zip(rows.tensor_split(len(places)), places, strict=True)]


def lifted(block_fn: func.BlockFn, fusion: func.Fusion, numerics: Numerics) -> BlockFunction:
    """The block as steps take it."""
    return fusion.lift(evened(block_fn, numerics))


def _quantize(
    tuned: Mapping[str, func.Prepared], params: func.Params, specs: Mapping[str, func.WeightSpec]
) -> dict[str, func.Codes]:
    codes = {}
    for path, prepared in tuned.items():
        try:
            codes[path] = func.quantize(prepared, params[path], specs[path])
        except AutoRoundError as error:
            raise type(error)(f"{path}: {error}") from error
    return codes


def _without_offsets(start: func.Params) -> func.Params:
    """The same, with the memory of one number for offsets, which are 0 before the first step."""
    return {path: own._replace(offset_OGS=own.offset_OGS.new_zeros(()).expand_as(own.offset_OGS))
            for path, own in start.items()}  # fmt: skip


def _starved(tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Module of experts -> bool (E,), its starved ones, of modules that have some."""
    starved = {module: own_E < STARVED_TOKENS for module, own_E in tokens.items()}
    return {module: own_E for module, own_E in starved.items() if own_E.any()}
