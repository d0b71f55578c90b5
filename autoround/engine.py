"""The engine: plans a run, opens its journal, lets the loop over blocks fill it, and writes the formats."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock
from torch import nn

from autoround import config
from autoround.activations import Place, choose_place
from autoround.backends.base import Numerics, named, of_rank, select_all
from autoround.backends.host import free_bytes
from autoround.beside import beside
from autoround.coverage import told
from autoround.data.positions import within_positions
from autoround.data.tokens import Calibration, load_calibration, needs_tokenizer
from autoround.errors import UsageError
from autoround.export import Target, origin, write_formats
from autoround.families import split
from autoround.fate import plan_run
from autoround.follower import Follower
from autoround.formats.registry import rules
from autoround.formats.writer import check_alone, check_folder, parse_size
from autoround.identity import manifest_of, shared_facts
from autoround.journal import MANIFEST, SCALE_STEPS, Journal, hold, open_journal, read_manifest
from autoround.launch import launched
from autoround.log import LOGGER
from autoround.loop import BlockLoop
from autoround.model.experts import describe
from autoround.model.finish import head_path
from autoround.model.load import OpenModel, open_model
from autoround.model.oddities import needed_numerics
from autoround.model.sample import Sampler
from autoround.model.skeleton import sees_images
from autoround.numerics import choose_numerics
from autoround.placement import check_room, find_named
from autoround.plan import Plan, check_head, with_extra
from autoround.progress import BlockDone, Meter, Progress
from autoround.ranks import agree, join
from autoround.recipe import Recipe
from autoround.scales import ScaleTuner

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
    first, *others = split(recipe)
    runs = [Run(model, first, tokenizer=tokenizer, on_progress=on_progress)]
    agree(runs[0].ranks, {"format": recipe.format})  # ranks with other runs to come would wait for each other
    return *runs, *(Run(model, each, tokenizer=tokenizer, on_progress=on_progress) for each in others)


class Run:
    """A planned run: iterate to tune block after block, then ``export``.

    Attributes:
        recipe: the settings.
        model: the opened model.
        plan: the fate of every weight.
        ranks: processes that share the run.
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
        if len(recipe.format) == 1 and not recipe.overwrite:
            check_alone(self._output)
        launch = launched(os.environ)
        self._backend, devices = select_all(recipe.device_map)
        by_module = named(recipe.device_map)
        if launch and by_module:
            raise UsageError(f"device_map: found {recipe.device_map!r}; needed devices alone, which processes share")
        if by_module and recipe.scale_steps:
            raise UsageError(
                f"scale_steps: found {recipe.scale_steps} with device_map {recipe.device_map!r}; needed blocks that "
                "lie on one device each; use --scale_steps 0"
            )
        self._devices = of_rank(self._backend, devices, launch)
        self._device = self._devices[0]
        self.ranks = join(launch, self._backend.name)
        self._first = self.ranks.rank == 0
        recorded = read_manifest(self.journal_folder).get("numerics", {}) if continued and self._first else {}
        recorded = self.ranks.tell(recorded)
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
        self.recipe = recipe = within_positions(recipe, self.model.config)
        shape = dataclasses.replace(describe(self.model.skeleton), head=head_path(self.model.skeleton))
        self._head = shape.head
        recorded = {**needed_numerics(self.model.config.model_type), **recorded}
        self.plan: Plan = with_extra(plan_run(recipe, self.model, shape, format_rules), self.model.source.extra())
        blocks = [block.path for block in self.plan.blocks]
        self._named = find_named(by_module, self.model.skeleton, blocks)
        sharing = 1 if self._named else len(self._devices)
        parts = launch.parts if launch and recipe.parallel == "data" else sharing
        self._numerics = choose_numerics(recipe, self.plan, self._backend, parts, {"attention": attention, **recorded})
        free, dtype = min(free_bytes().values()), self._numerics.torch_dtype
        free //= launch.local_size if launch else 1
        self._place = choose_place(recipe, self.model, dtype, self._device, free)
        listen = on_progress if self._first else None
        abreast = self.ranks.size if recipe.parallel == "blocks" else 1
        then = "scales" if recipe.scale_steps and self.plan.specs else ""
        self._meter = Meter(len(self.plan.parts), recipe.iters, self._backend.memory_bytes, listen, abreast, then)
        self._journal: Journal | None = None
        self._lock: BaseFileLock | None = None  # of a journal that is there; held from before the first work on
        self._origin = origin(
            model, revision=recipe.revision, cache_dir=recipe.cache_dir, trust_remote_code=recipe.trust_remote_code
        )
        agree(self.ranks, shared_facts(recipe, self._numerics))

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
        check_room(self.recipe, self.plan.blocks, self._rooms())
        torch.set_num_threads(self._numerics.threads)  # a model that writes rows repeats them with as many
        self._lock = hold(self.journal_folder) if self._first else None
        if self._numerics.compiler:
            beside(self._backend.prepare_compiler)
        needed = self._first and self.recipe.needs_data and self.plan.specs
        calibration = self.ranks.tell(self._calibration() if needed else None)
        if self._journal is None:
            self._journal = self._open_journal(calibration)
        journal = self._journal
        finished = self._finished(journal)
        for index in range(finished):
            yield self._meter.resumed(index, self.plan.parts[index].title, told(journal.read_stats(index)))
        if finished < len(self.plan.parts):
            yield from self._loop(journal).run(calibration if self.recipe.tunes_blocks else None, finished)
        journal.activations.drop()
        self._tune_scales(journal, calibration)

    def _tune_scales(self, journal: Journal, calibration: Calibration | None) -> None:
        """What the recipe asks for after the last block; the first rank does it while others wait."""
        if self._first and journal.scale_steps() != self._scale_steps:
            if not self._scale_steps:
                journal.drop_scales()
            elif calibration is not None:
                tuner = ScaleTuner(
                    recipe=self.recipe,
                    model=self.model,
                    plan=self.plan,
                    numerics=self._numerics,
                    device=self._device,
                    home=self._place.home,
                    journal=journal,
                    meter=self._meter,
                )
                journal.write_scales(tuner.run(calibration), self._scale_steps)
        self.ranks.tell(None)

    @property
    def _scale_steps(self) -> int:
        """Those of the recipe, where anything is quantized."""
        return self.recipe.scale_steps if self.plan.specs else 0

    def _done(self, journal: Journal) -> bool:
        """Whether nothing is left but to write files; the first rank knows."""
        blocks = self._finished(journal) == len(self.plan.parts)
        return blocks and self.ranks.tell(self._first and journal.scale_steps() == self._scale_steps)

    def _rooms(self) -> dict[str, int]:
        """Bytes for one block by what sets the bound; nothing is said of blocks that several devices may share."""
        if self._device.type == "cpu":
            return free_bytes()
        size = self._backend.device_bytes(self._device) if len(self._devices) == 1 else None
        return {} if size is None else {str(self._device): size}

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
        if self._journal is None or not self._done(self._journal):
            list(self)
        assert self._journal is not None
        self._backend.release_memory()
        return self.ranks.tell(self._write(self._journal, target) if self._first else ())

    def _write(self, journal: Journal, target: Target) -> tuple[Path, ...]:
        return write_formats(
            self.model,
            self.plan,
            journal.read_block,
            target,
            on_format=lambda name, folder: self._meter.phase("export", f"{name} in {folder}"),
        )

    def _finished(self, journal: Journal) -> int:
        """How many blocks are done; the first rank knows."""
        return self.ranks.tell(journal.finished())

    def _loop(self, journal: Journal) -> BlockLoop:
        return BlockLoop(
            recipe=self.recipe,
            model=self.model,
            plan=self.plan,
            head=self._head,
            backend=self._backend,
            devices=self._devices,
            journal=journal,
            meter=self._meter,
            numerics=self._numerics,
            place=self._place,
            ranks=self.ranks,
            named=self._named,
        )

    def _calibration(self) -> Calibration:
        self._meter.phase("calibration", "reading text")
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
        if not self._first:
            return Follower(self.journal_folder, self.ranks.rank)
        self._meter.phase("calibration", "hashing the source weights")
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
        journal.record(**{SCALE_STEPS: self._scale_steps})
        model = (self._origin or {}).get("model", "")
        # what is done is not to be done again
        named = dataclasses.replace(self.recipe, model=model, restart=False, overwrite=False)
        config.write(named, folder / config.NAME)
        return journal
