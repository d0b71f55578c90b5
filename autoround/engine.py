"""The engine: the one loop over blocks. It feeds the functional tuner, writes the journal and reports progress."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from autoround import func
from autoround.backends.base import Numerics, jit, select
from autoround.data.tokens import Calibration, load_calibration, needs_tokenizer
from autoround.formats.registry import get_format, rules
from autoround.formats.writer import write_checkpoint
from autoround.func import init
from autoround.journal import MANIFEST, Journal, digest, open_journal, read_manifest
from autoround.model.blocks import structure
from autoround.model.capture import CallTemplate, capture
from autoround.model.load import open_model
from autoround.model.read import read_block
from autoround.plan import BlockPlan, Plan, resolve
from autoround.progress import BlockDone, Meter, Progress
from autoround.recipe import Recipe

# Rows that the clip search weighs input channels by; more do not change its choice.
MOMENT_ROWS = 32
# Settings that decide no code by themselves: what they stand for is in the manifest in another form, or nothing is.
FREE_SETTINGS = frozenset({
    "model", "revision", "cache_dir", "trust_remote_code", "dataset", "format", "output_dir", "overwrite",
    "max_shard_size", "model_dtype", "device_map", "low_gpu_mem_usage", "torch_compile",
})  # fmt: skip


class Stream(NamedTuple):
    """What flows from block to block.

    Attributes:
        float_NTD: outputs of the float blocks.
        quantized_NTD: outputs of the quantized blocks.
    """

    float_NTD: Tensor
    quantized_NTD: Tensor


class Inputs(NamedTuple):
    """What a block is tuned on: its calls, the rows that flow in, and which tokens count."""

    template: CallTemplate
    stream: Stream
    valid_NT: Tensor


def quantize(
    model: str | Path | nn.Module,
    recipe: Recipe,
    *,
    tokenizer: Any = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> "Run":
    """Open a model and plan its quantization; iterate over the result to do the work.

    Args:
        model: hub name, folder, .gguf file, or a transformers model in memory (which is not changed).
        recipe: all settings.
        tokenizer: for a model in memory whose calibration data is text.
        on_progress: called a few times a second while work goes on.

    Raises:
        AutoRoundError: whatever would make the run fail later and can be known now.
    """
    return Run(model, recipe, tokenizer=tokenizer, on_progress=on_progress)


class Run:
    """A planned run: iterate to tune block after block, then ``export``.

    Attributes:
        recipe: the settings.
        model: the opened model.
        plan: the fate of every weight.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        recipe: Recipe,
        *,
        tokenizer: Any = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.recipe = recipe
        format_rules = [rules(name) for name in recipe.format]
        self._backend, self._device = select(recipe.device_map)
        numerics = self._default_numerics()
        self.model = open_model(
            model,
            revision=recipe.revision,
            cache_dir=recipe.cache_dir,
            trust_remote_code=recipe.trust_remote_code,
            tokenizer=tokenizer,
            attn_implementation=numerics.attention,
        )
        self.plan: Plan = resolve(recipe.spec, recipe.odd_shapes, structure(self.model.skeleton), format_rules)
        self._numerics = numerics
        self._meter = Meter(len(self.plan.blocks), recipe.iters, self._backend.memory_bytes, on_progress)
        self._journal: Journal | None = None
        self._steps: dict[tuple[Any, ...], Any] = {}

    @property
    def journal_folder(self) -> Path:
        """Where finished blocks are kept: beside the output folder and named after it."""
        output = Path(self.recipe.output_dir)
        return output.with_name(f"{output.name}.journal")

    def __iter__(self) -> Iterator[BlockDone]:
        """Do the work, one event per block; blocks that an interrupted run finished are reported as resumed."""
        calibration = self._calibration() if self.recipe.needs_data else None
        journal = self._open_journal(calibration)
        finished = journal.finished()
        for index in range(finished):
            yield self._meter.resumed(index, self.plan.blocks[index].path, journal.read_stats(index))
        if finished < len(self.plan.blocks):
            yield from self._tune_blocks(journal, calibration, finished)
        journal.drop_activations()
        self._journal = journal

    def export(self, output_dir: str | Path | None = None, *, formats: Sequence[str] | None = None) -> tuple[Path, ...]:
        """Write the quantized model, first running what is left to run.

        Args:
            output_dir: the recipe's when not given. One format is written to this folder itself, several to
                subfolders named after them.
            formats: the recipe's when not given; each must be able to hold the planned codes.

        Returns:
            The folder of each format.

        Raises:
            AutoRoundError: a format cannot hold the codes, or a written file does not read back as the codes.
        """
        if self._journal is None:
            for _ in self:
                pass
        assert self._journal is not None
        output, names = Path(output_dir or self.recipe.output_dir), tuple(formats or self.recipe.format)
        folders = tuple(output if len(names) == 1 else output / name.replace(":", "_") for name in names)
        for name, folder in zip(names, folders, strict=True):
            self._meter.phase("export", f"{name} in {folder}")
            write_checkpoint(
                self.model,
                self.plan,
                self._journal.read_block,
                get_format(name),
                folder,
                max_shard_size=self.recipe.max_shard_size,
                dtype=self.recipe.model_dtype or ("float16" if self.model.gguf_file else None),
                overwrite=True,
            )
        return folders

    def _default_numerics(self) -> Numerics:
        recipe, backend = self.recipe, self._backend
        compiled = recipe.torch_compile
        if compiled is None:
            compiled = backend.compile_helps(recipe.iters * recipe.batch_size * recipe.gradient_accumulate_steps * recipe.seqlen)
        return Numerics(
            device=self._device.type,
            dtype=str(backend.compute_dtype()).removeprefix("torch."),
            attention=backend.attention(recipe.seqlen),
            compiled=compiled and recipe.iters > 0,
            threads=torch.get_num_threads(),
        )

    def _calibration(self) -> Calibration:
        self._meter.phase("calibration", "reading text")
        recipe = self.recipe
        return load_calibration(
            recipe.dataset,
            self.model.tokenizer() if needs_tokenizer(recipe.dataset) else None,
            nsamples=recipe.nsamples,
            seqlen=recipe.seqlen,
            batch_size=recipe.batch_size * recipe.gradient_accumulate_steps,
            seed=recipe.seed,
            vocab_size=self.model.config.get_text_config().vocab_size,
        )

    def _open_journal(self, calibration: Calibration | None) -> Journal:
        self._meter.phase("calibration", "hashing the source weights")
        folder, source = self.journal_folder, self.model.source
        if not self.recipe.overwrite and (folder / MANIFEST).exists():
            self._numerics = dataclasses.replace(
                self._numerics, **{**read_manifest(folder)["numerics"], "device": self._device.type}
            )
            torch.set_num_threads(self._numerics.threads)
        tokens = () if calibration is None else (("tokens", calibration.tokens_NT), ("valid", calibration.valid_NT))
        settings = dataclasses.asdict(self.recipe)
        manifest = {
            "recipe": {name: value for name, value in settings.items() if name not in FREE_SETTINGS},
            "plan": {path: dataclasses.asdict(spec) for path, spec in self.plan.specs.items()},
            "source_sha256": digest((name, source.read(name)) for name in sorted(source.names())),
            "calibration_sha256": digest(iter(tokens)),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "numerics": dataclasses.asdict(self._numerics),
        }
        return open_journal(folder, manifest, overwrite=self.recipe.overwrite)

    def _tune_blocks(self, journal: Journal, calibration: Calibration | None, start: int) -> Iterator[BlockDone]:
        """The loop over blocks."""
        home = torch.device("cpu") if self.recipe.low_gpu_mem_usage else self._device
        blocks, inputs, templates = self.plan.blocks, None, ()
        if calibration is not None:
            captured = capture(
                self.model, calibration.tokens_NT, calibration.valid_NT, blocks=[block.path for block in blocks],
                batch_size=self.recipe.batch_size, device=self._device, dtype=self._numerics.torch_dtype)  # fmt: skip
            templates, hidden_NTD = captured.templates, captured.hidden_NTD.to(home)
            stream = Stream(hidden_NTD, hidden_NTD)
            if start:
                kept = journal.read_activations(start - 1)
                stream = Stream(*(kept[name].to(home) for name in Stream._fields))
            inputs = Inputs(templates[start], stream, calibration.valid_NT)
        for index in range(start, len(blocks)):
            block = blocks[index]
            self._meter.begin(index, block.path)
            codes, losses_K, stream_after = self._tune_one(index, block, inputs)
            if stream_after is not None:
                journal.write_activations(index, stream_after._asdict())
                inputs = Inputs(templates[index + 1], stream_after, calibration.valid_NT)
            stats = _stats(losses_K)
            journal.write_block(index, codes, stats)
            yield self._meter.end(index, block.path, stats)

    def _tune_one(
        self, index: int, block: BlockPlan, inputs: Inputs | None
    ) -> tuple[dict[str, func.IntCodes], Tensor, Stream | None]:
        """Codes of one block, the loss of every step, and what flows into the next block if there is one."""
        dtype, specs = self._numerics.torch_dtype, block.specs
        tensors = read_block(self.model, block.path, device=self._device)
        block_fn = func.make_block_fn(self.model.skeleton.get_submodule(block.path))
        try:
            weights = func.split_tensors(tensors, specs)
        except ValueError as error:
            raise type(error)(f"{block.path}.{error}") from error
        weights = weights._replace(frozen=_cast(weights.frozen, dtype))
        if inputs is None:
            params, losses_K = func.init_params(weights.tuned), torch.zeros(0)
        else:
            float_tensors = _cast(tensors, dtype)
            target_NTD = self._forward(block_fn, float_tensors, inputs.template, inputs.stream.float_NTD)
            params = self._start(block_fn, float_tensors, weights, specs, inputs)
            del float_tensors
            batches = self._batches(index, inputs, target_NTD)
            params, losses_K = self._tune(block_fn, weights, specs, params, batches)
        codes = {path: func.quantize(prepared, params[path], specs[path]) for path, prepared in weights.tuned.items()}
        if inputs is None or index + 1 == len(self.plan.blocks):
            return codes, losses_K, None
        rounded = {f"{path}.weight": func.dequantize(own, specs[path]).to(dtype) for path, own in codes.items()}
        quantized_NTD = self._forward(block_fn, {**weights.frozen, **rounded}, inputs.template, inputs.stream.quantized_NTD)
        return codes, losses_K, Stream(target_NTD, quantized_NTD)

    def _forward(self, block_fn: func.BlockFn, tensors: Mapping[str, Tensor], template: CallTemplate, x_NTD: Tensor) -> Tensor:
        """The block's outputs for all rows, where the rows live."""
        y_NTD = torch.empty_like(x_NTD)
        with torch.no_grad():
            for rows_B in torch.arange(len(x_NTD)).split(self.recipe.batch_size):
                y_NTD[rows_B] = block_fn(tensors, self._call(template, x_NTD, rows_B)).to(y_NTD.device)
        return y_NTD

    def _call(self, template: CallTemplate, x_NTD: Tensor, rows_B: Tensor) -> func.Call:
        return template.bind(x_NTD[rows_B].to(self._device), rows_B)

    def _start(
        self,
        block_fn: func.BlockFn,
        tensors: Mapping[str, Tensor],
        weights: func.BlockWeights,
        specs: Mapping[str, func.QuantSpec],
        inputs: Inputs,
    ) -> func.Params:
        """Parameters before the first step."""
        if not self.recipe.clip_search:
            return func.init_params(weights.tuned)
        x_NTD, valid_NT = inputs.stream.quantized_NTD, inputs.valid_NT
        rows = torch.arange(min(len(x_NTD), MOMENT_ROWS)).split(self.recipe.batch_size)
        calls = ((self._call(inputs.template, x_NTD, rows_B), valid_NT[rows_B].to(self._device)) for rows_B in rows)
        moments = init.second_moments(block_fn, tensors, calls, specs)
        errors = self._compiled("rounding_errors", lambda: init.rounding_errors)
        return init.search_params(weights, moments, specs, errors=errors)

    def _tune(
        self,
        block_fn: func.BlockFn,
        weights: func.BlockWeights,
        specs: Mapping[str, func.QuantSpec],
        params: func.Params,
        batches: Iterator[Any],
    ) -> func.TuneResult:
        recipe, dtype = self.recipe, self._numerics.torch_dtype
        optimizer = make_optimizer(recipe, self.plan.spec.bits)
        key = (block_fn.signature, *specs.items())
        step: Any
        if recipe.gradient_accumulate_steps == 1:
            step = self._compiled(("step", *key), lambda: func.make_step(block_fn, specs, optimizer, dtype=dtype))
        else:
            gradient = self._compiled(("gradient", *key), lambda: func.make_gradient(block_fn, specs, dtype=dtype))
            update = self._compiled(("update", *key), lambda: func.make_update(optimizer))
            step = func.accumulate(gradient, update)
        state = func.init_state(params, optimizer, keep_best=recipe.keep == "best")
        tokens = recipe.batch_size * recipe.gradient_accumulate_steps * recipe.seqlen
        return func.tune_block(
            step, weights, state, batches, on_step=lambda done, loss: self._meter.step(done, tokens, loss.item)
        )

    def _batches(self, index: int, inputs: Inputs, target_NTD: Tensor) -> Iterator[Any]:
        """One element per step: a batch, or a list of micro-batches."""
        recipe = self.recipe
        parts = recipe.gradient_accumulate_steps
        for rows in batch_rows(recipe.seed, index, len(target_NTD), recipe.batch_size * parts, recipe.iters):
            batches = [
                func.Batch(
                    self._call(inputs.template, inputs.stream.quantized_NTD, rows_B),
                    target_NTD[rows_B].to(self._device),
                    inputs.valid_NT[rows_B].to(self._device),
                )
                for rows_B in rows.chunk(parts)
            ]
            yield batches[0] if parts == 1 else batches

    def _compiled(self, key: Any, make: Callable[[], Any]) -> Any:
        """A function compiled once per key for the whole run."""
        if key not in self._steps:
            self._steps[key] = jit(make(), enabled=self._numerics.compiled)
        return self._steps[key]


def make_optimizer(recipe: Recipe, bits: int) -> func.Transform:
    """The recipe's optimizer: SignSGD or AdamW, offsets and clips with learning rates of their own."""
    rate = recipe.learning_rate(bits)
    family = func.adamw if recipe.adam else partial(func.signsgd, momentum=recipe.momentum)
    return func.partition(
        {
            "offset": family(func.linear_decay(rate, max(recipe.iters, 1))),
            "clip": family(func.linear_decay(recipe.minmax_lr or rate, max(recipe.iters, 1))),
        },
        func.by_field,
    )


def batch_rows(seed: int, block: int, rows: int, batch_size: int, steps: int) -> Iterator[Tensor]:
    """Rows of each step's batch, a pure function of (seed, block, step): epochs of shuffled rows, whole batches only.

    >>> [batch.tolist() for batch in batch_rows(0, 0, rows=4, batch_size=2, steps=2)] == [
    ...     batch.tolist() for batch in batch_rows(0, 0, rows=4, batch_size=2, steps=3)][:2]
    True
    """
    per_epoch = rows // batch_size
    order_N = torch.empty(0)
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + block) * 1_000_003 + epoch)
            order_N = torch.randperm(rows, generator=generator)
        yield order_N[place * batch_size : (place + 1) * batch_size]


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _stats(losses_K: Tensor) -> dict[str, float]:
    if not len(losses_K):
        return {}
    return {"loss_first": float(losses_K[0]), "loss_best": float(losses_K.min()), "loss_last": float(losses_K[-1])}
