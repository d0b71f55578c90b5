"""The engine: the one loop over blocks. It feeds the functional tuner, writes the journal and reports progress."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock
from torch import Tensor, nn

from autoround import config, func
from autoround.activations import Inputs, Place, Stream, choose_place
from autoround.backends.base import Numerics, select_all
from autoround.backends.host import free_bytes
from autoround.coverage import token_stats, told
from autoround.data.tokens import Calibration, load_calibration, needs_tokenizer
from autoround.errors import AutoRoundError, UsageError
from autoround.export import Target, origin, write_formats
from autoround.families import split
from autoround.fate import plan_run
from autoround.formats.registry import rules
from autoround.formats.writer import check_folder, parse_size
from autoround.identity import manifest_of
from autoround.journal import MANIFEST, Journal, hold, open_journal, read_manifest
from autoround.log import LOGGER
from autoround.model.calls import CallTemplate
from autoround.model.capture import capture
from autoround.model.experts import describe
from autoround.model.finish import Ending, head_path, mean_square, read_weight
from autoround.model.load import OpenModel, open_model
from autoround.model.media import Media
from autoround.model.oddities import needed_numerics
from autoround.model.read import read_block
from autoround.model.sample import Sampler
from autoround.model.skeleton import sees_images
from autoround.numerics import choose_numerics
from autoround.plan import Plan, check_head, with_extra
from autoround.progress import BlockDone, Meter, Progress
from autoround.recipe import Recipe
from autoround.tuner import MOMENT_ROWS, BlockTuner

TEXT_ALONE = (
    "calibration data: text alone for a model that sees images: what image tokens make its layers compute is not seen, "
    "so that answers about images may lose more than text does; give a .jsonl of messages with images"
)


def quantize(
    model: str | Path | nn.Module | OpenModel,
    recipe: Recipe,
    *,
    tokenizer: Any = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> "Run":
    """Open a model and plan its quantization; iterate over the result to do the work.

    Args:
        model: hub name, folder, .gguf file, or a transformers model in memory (which is not changed); or one that is
            opened already.
        recipe: all settings.
        tokenizer: for a model in memory whose calibration data is text.
        on_progress: called a few times a second while work goes on.

    Raises:
        AutoRoundError: whatever would make the run fail later and can be known now.
    """
    return Run(model, recipe, tokenizer=tokenizer, on_progress=on_progress)


def quantize_each(
    model: str | Path | nn.Module | OpenModel,
    recipe: Recipe,
    *,
    tokenizer: Any = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple["Run", ...]:
    """Plan a run for each grid that the recipe's formats need: one for integer codes, one for each GGUF file type.

    Args and errors are those of ``quantize``; all runs are planned before any work starts.
    """
    recipes = split(recipe)
    return tuple(Run(model, each, tokenizer=tokenizer, on_progress=on_progress) for each in recipes)


class Run:
    """A planned run: iterate to tune block after block, then ``export``.

    Attributes:
        recipe: the settings.
        model: the opened model.
        plan: the fate of every weight.
    """

    def __init__(
        self,
        model: str | Path | nn.Module | OpenModel,
        recipe: Recipe,
        *,
        tokenizer: Any = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        if len(recipes := split(recipe)) > 1:
            raise UsageError(
                f"format: found {', '.join(recipe.format)}, which need {len(recipes)} grids; needed formats of one; "
                "use quantize_each"
            )
        self.recipe = recipe
        format_rules = [rules(name) for name in recipe.format]
        for each in format_rules:
            check_head(recipe.quant_lm_head, each)
        parse_size(recipe.max_shard_size)
        known = (self.journal_folder / MANIFEST).exists()
        continued = known and not (recipe.overwrite or recipe.restart)
        check_folder(self._output, overwrite=recipe.overwrite or known)
        self._backend, self._devices = select_all(recipe.device_map)
        self._device = self._devices[0]
        recorded = read_manifest(self.journal_folder).get("numerics", {}) if continued else {}
        attention = recorded.get("attention") or self._backend.attention(recipe.seqlen)
        self.model = open_model(
            model,
            revision=recipe.revision,
            cache_dir=recipe.cache_dir,
            token=recipe.token,
            trust_remote_code=recipe.trust_remote_code,
            tokenizer=tokenizer,
            attn_implementation=attention,
        )
        shape = dataclasses.replace(describe(self.model.skeleton), head=head_path(self.model.skeleton))
        self._head = shape.head
        recorded = {**needed_numerics(self.model.config.model_type), **recorded}
        self.plan: Plan = with_extra(plan_run(recipe, self.model, shape, format_rules), self.model.source.extra())
        self._numerics = choose_numerics(
            recipe, self.plan, self._backend, len(self._devices), {"attention": attention, **recorded}
        )
        free, dtype = min(free_bytes().values()), self._numerics.torch_dtype
        self._place = choose_place(recipe, self.model, dtype, self._device, free)
        self._meter = Meter(len(self.plan.parts), recipe.iters, self._backend.memory_bytes, on_progress)
        self._journal: Journal | None = None
        self._lock: BaseFileLock | None = None  # of a journal that is there; held from before the first work on
        self._origin = origin(
            model, revision=recipe.revision, cache_dir=recipe.cache_dir, trust_remote_code=recipe.trust_remote_code
        )

    @property
    def numerics(self) -> Numerics:
        """How it computes."""
        return self._numerics

    @property
    def place(self) -> Place:
        """Where activations lie."""
        return self._place

    @property
    def device(self) -> torch.device:
        """Where blocks run; the first of several."""
        return self._device

    @property
    def journal_folder(self) -> Path:
        """Where finished blocks are kept: beside the output folder and named after it."""
        return self._output.with_name(f"{self._output.name}.journal")

    @property
    def _output(self) -> Path:
        return Path(self.recipe.output_dir)

    def __iter__(self) -> Iterator[BlockDone]:
        """Do the work, one event per block; blocks that an interrupted run finished are reported as resumed."""
        self._lock = hold(self.journal_folder)
        calibration = self._calibration() if self.recipe.needs_data and self.plan.specs else None
        if self._journal is None:
            self._journal = self._open_journal(calibration)
        journal = self._journal
        finished = journal.finished()
        for index in range(finished):
            yield self._meter.resumed(index, self.plan.parts[index].title, told(journal.read_stats(index)))
        if finished < len(self.plan.parts):
            yield from self._tune_blocks(journal, calibration, finished)
        journal.activations.drop()

    def export(self, output_dir: str | Path | None = None, *, formats: Sequence[str] | None = None) -> tuple[Path, ...]:
        """Write the quantized model, first running what is left to run.

        Args:
            output_dir: the recipe's when not given; another one must be empty unless the recipe says overwrite. One
                format is written to this folder itself, several to subfolders named after them.
            formats: the recipe's when not given; each must be able to hold the planned codes.

        Returns:
            The folder of each format.

        Raises:
            AutoRoundError: a format cannot hold the codes, or a written file does not read back as the codes.
        """
        recipe, output = self.recipe, Path(output_dir or self._output)
        target = Target(
            folder=output,
            formats=tuple(formats or recipe.format),
            dtype=recipe.model_dtype,
            max_shard_size=recipe.max_shard_size,
            overwrite=recipe.overwrite or output == self._output,
        )
        target.check(self.plan)
        if self._journal is None or self._journal.finished() < len(self.plan.parts):
            for _ in self:
                pass
        assert self._journal is not None
        self._backend.release_memory()
        return write_formats(
            self.model,
            self.plan,
            self._journal.read_block,
            target,
            on_format=lambda name, folder: self._meter.phase("export", f"{name} in {folder}"),
        )

    def _calibration(self) -> Calibration:
        self._meter.phase("calibration", "reading text")
        torch.set_num_threads(self._numerics.threads)  # a model that writes rows repeats them with as many
        recipe = self.recipe
        writer = Sampler(
            self.model,
            device=self._device,
            dtype=self._numerics.torch_dtype,
            on_progress=lambda done, total: self._meter.phase("calibration", f"writing text: {done} of {total} tokens"),
        )
        found = load_calibration(
            recipe.dataset,
            self.model.tokenizer() if needs_tokenizer(recipe.dataset) else None,
            nsamples=recipe.nsamples,
            seqlen=recipe.seqlen,
            batch_size=recipe.batch_size * recipe.gradient_accumulate_steps,
            seed=recipe.seed,
            writer=writer,
        )
        if sees_images(self.model.config) and not found.extras:
            LOGGER.warning(TEXT_ALONE)
        return found

    def _open_journal(self, calibration: Calibration | None) -> Journal:
        self._meter.phase("calibration", "hashing the source weights")
        torch.set_num_threads(self._numerics.threads)
        manifest = manifest_of(
            self.recipe,
            self.plan,
            self._numerics,
            source=self.model.source,
            calibration=calibration,
            origin=self._origin,
        )
        folder, restart = self.journal_folder, self.recipe.overwrite or self.recipe.restart
        journal = open_journal(folder, manifest, restart=restart)
        named = dataclasses.replace(self.recipe, model=(self._origin or {}).get("model", ""), restart=False)
        config.write(named, folder / config.NAME)
        return journal

    def _tune_blocks(self, journal: Journal, calibration: Calibration | None, start: int) -> Iterator[BlockDone]:
        """The loop over blocks, and what comes after them."""
        recipe, blocks, count = self.recipe, self.plan.blocks, len(self.plan.parts)
        tokens = recipe.batch_size * recipe.gradient_accumulate_steps * recipe.seqlen
        tuner = BlockTuner(
            recipe, self._numerics, self._devices, on_step=lambda done, loss: self._meter.step(done, tokens, loss)
        )
        templates, stream = self._captured(journal, calibration, start)
        for index in range(start, len(blocks)):
            block = blocks[index]
            self._meter.begin(index, block.path)
            block_fn = func.make_block_fn(self.model.skeleton.get_submodule(block.path))
            tensors = read_block(self.model, block.path, device=self._device)
            inputs = None
            if stream is not None and calibration is not None:
                room = self._place.empty(journal.activations, index)
                inputs = Inputs(templates[index], stream, calibration.valid_NT, room)
            try:
                tuned = tuner.tune(index, block_fn, tensors, block.specs, inputs)
            except AutoRoundError as error:
                raise type(error)(f"{block.path}.{error}") from error
            stream = tuned.stream
            if stream is not None and index + 1 < count:
                journal.activations.write(index, stream._asdict())
            stats = _stats(tuned.losses_K) | token_stats(tuned.tokens)
            journal.write_block(index, tuned.codes, stats)
            yield self._meter.end(index, block.path, told(stats))
        if len(blocks) < count:
            title = self.plan.parts[-1].title
            self._meter.begin(len(blocks), title)
            journal.write_block(len(blocks), self._outside(tuner, stream, calibration), {})
            yield self._meter.end(len(blocks), title, {})

    def _outside(
        self, tuner: BlockTuner, stream: Stream | None, calibration: Calibration | None
    ) -> dict[str, func.Codes]:
        """Codes of the layers outside the blocks; only the head's inputs are known."""
        specs, moments = self.plan.parts[-1].specs, {}
        head = self._head
        if head and head not in specs:  # it may compute with the weight of another one
            head = self.plan.layers[head].shape.tied_to
        if head in specs and stream is not None and calibration is not None:
            blocks = [block.path for block in self.plan.blocks]
            ending = Ending(self.model, blocks, self._head, self._device, self._numerics.torch_dtype)
            rows = (stream.quantized_NTD, calibration.tokens_NT, calibration.valid_NT)
            media, size = Media(calibration.extras), self.recipe.batch_size
            inputs = ending.head_inputs(*(each[:MOMENT_ROWS] for each in rows), batch_size=size, media=media)
            moments[head] = mean_square(inputs)
        weights = ((path, read_weight(self.model, path, device=self._device)) for path in specs)
        return {path: tuner.quantize_layer(path, own, specs[path], moments.get(path)) for path, own in weights}

    def _captured(
        self, journal: Journal, calibration: Calibration | None, start: int
    ) -> tuple[tuple[CallTemplate, ...], Stream | None]:
        """How every block is called, and what flows into block ``start``; nothing where there is no data."""
        if calibration is None:
            return (), None
        self._meter.phase("calibration", f"capturing the calls of all blocks; activations lie {self._place}")
        home = self._place.home
        captured = capture(
            self.model,
            calibration.tokens_NT.to(home),
            calibration.valid_NT.to(home),
            batch_size=self.recipe.batch_size,
            media=Media(calibration.extras),
            device=self._device,
            dtype=self._numerics.torch_dtype,
        )
        if start == 0:
            return captured.templates, self._place.first(journal.activations, captured.hidden_NTD)
        return captured.templates, self._place.again(journal.activations, start)


def _stats(losses_K: Tensor) -> dict[str, float]:
    if not len(losses_K):
        return {}
    return {"loss_first": float(losses_K[0]), "loss_best": float(losses_K.min()), "loss_last": float(losses_K[-1])}
