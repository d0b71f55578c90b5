"""The one loop over blocks: read, tune, journal, and begin a block again with less at a time where memory runs out."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoround import func
from autoround.activations import Inputs, Place, Stream
from autoround.backends.base import Backend, Numerics
from autoround.coverage import token_stats, told
from autoround.data.tokens import Calibration
from autoround.errors import AutoRoundError, JournalError, ModelError
from autoround.journal import Journal
from autoround.log import LOGGER
from autoround.model.calls import CallTemplate
from autoround.model.capture import capture
from autoround.model.finish import Ending, mean_square, read_weight
from autoround.model.load import OpenModel
from autoround.model.media import Media
from autoround.model.read import read_block
from autoround.numerics import divided, ran_out
from autoround.plan import Plan
from autoround.progress import BlockDone, Meter
from autoround.ranks import Ranks, compare
from autoround.recipe import Recipe
from autoround.tuner import MOMENT_ROWS, BlockTuner, Tuned


@dataclass(kw_only=True)
class BlockLoop:
    """Work on the blocks that a journal does not have yet.

    Attributes:
        recipe: the settings.
        model: the opened model.
        plan: the fate of every weight.
        head: path of the output head; empty where there is none.
        backend: of the devices.
        devices: where blocks run; more than one share the rows of a step.
        journal: what is done, and what flows into the next block.
        meter: is told of the work.
        numerics: how to compute; other ones where memory ran out.
        place: where activations lie; another one where memory ran out.
        ranks: processes that do the same work, and share the rows of it.
    """

    recipe: Recipe
    model: OpenModel
    plan: Plan
    head: str
    backend: Backend
    devices: Sequence[torch.device]
    journal: Journal
    meter: Meter
    numerics: Numerics
    place: Place
    ranks: Ranks

    def __post_init__(self) -> None:
        self._tuner = self._make_tuner()

    def run(self, calibration: Calibration | None, start: int) -> Iterator[BlockDone]:
        """Tune the blocks from ``start`` on, and what comes after them; one event for each that is done.

        Raises:
            AutoRoundError: a block cannot be tuned or kept; names the layer or the file.
        """
        blocks, count = self.plan.blocks, len(self.plan.parts)
        templates, stream = self._captured(calibration, start)
        for index in range(start, len(blocks)):
            if stream is None or calibration is None:
                tuned = self._tuned(index, None)
            else:
                tuned = self._tuned(index, Inputs(templates[index], stream, calibration.valid_NT))
            compare(self.ranks, blocks[index].path, tuned.codes)
            stream = tuned.stream
            if stream is not None and index + 1 < count:
                self.journal.activations.write(index, stream._asdict())
            stats = _stats(tuned.losses_K) | token_stats(tuned.tokens)
            self.journal.write_block(index, tuned.codes, stats)
            yield self.meter.end(index, blocks[index].path, told(stats))
        if len(blocks) < count:
            title = self.plan.parts[-1].title
            self.meter.begin(len(blocks), title)
            codes = self._outside(stream, calibration)
            compare(self.ranks, title, codes)
            self.journal.write_block(len(blocks), codes, {})
            yield self.meter.end(len(blocks), title, {})

    def _make_tuner(self) -> BlockTuner:
        recipe = self.recipe
        tokens = recipe.batch_size * recipe.gradient_accumulate_steps * recipe.seqlen
        return BlockTuner(
            recipe,
            self.numerics,
            self.devices,
            on_step=lambda done, loss: self.meter.step(done, tokens, loss),
            ranks=self.ranks,
        )

    def _tuned(self, index: int, inputs: Inputs | None) -> Tuned:
        """A tuned block, from its begin again whenever memory runs out and something can be changed."""
        while True:
            try:
                return self._attempt(index, inputs)
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            inputs = self._with_less(index, inputs, cause)  # the failed attempt's tensors are gone by now

    def _attempt(self, index: int, inputs: Inputs | None) -> Tuned:
        block = self.plan.blocks[index]
        self.meter.begin(index, block.path)
        if inputs is not None:
            inputs = inputs._replace(empty=self.place.empty(self.journal.activations, index))
        try:
            block_fn = func.make_block_fn(self.model.skeleton.get_submodule(block.path))
            tensors = read_block(self.model, block.path, device=self.devices[0])
            return self._tuner.tune(index, block_fn, tensors, block.specs, inputs)
        except JournalError:  # names a file, not a layer
            raise
        except AutoRoundError as error:
            raise type(error)(f"{block.path}.{error}") from error

    def _with_less(self, index: int, inputs: Inputs | None, cause: str) -> Inputs | None:
        """Change what takes memory: first how a step is divided, which the journal records, then where rows lie.

        Raises:
            ModelError: nothing is left to change.
        """
        path = self.plan.blocks[index].path
        if self.ranks.size > 1:  # the others know nothing of it
            raise ModelError(
                f"{path}: memory ran out on rank {self.ranks.rank} ({cause}); needed more; start again with "
                "fewer ranks on a machine: finished blocks are kept"
            )
        if inputs is not None and (finer := divided(self.numerics, self.recipe)):
            change = f"steps in {finer.micro_batches} parts, not {self.numerics.micro_batches}"
            self.numerics = finer
            self.journal.record(numerics=dataclasses.asdict(finer))
        elif inputs is not None and (place := self.place.roomier()):
            change = f"activations {place}, not {self.place}"
            self.place = place
            inputs = inputs._replace(stream=place.moved(self.journal.activations, index, inputs.stream, kept=True))
        else:
            raise ModelError(
                f"{path}: memory ran out ({cause}) with as little of it in use as settings allow; needed more; use a "
                "smaller --seqlen or --batch_size, or another --device_map"
            )
        LOGGER.warning("%s: memory ran out (%s); begins again with %s", path, cause, change)
        self._tuner = self._make_tuner()
        self.backend.release_memory()
        return inputs

    def _outside(self, stream: Stream | None, calibration: Calibration | None) -> dict[str, func.Codes]:
        """Codes of the layers outside the blocks; only the head's inputs are known."""
        specs, moments, device = self.plan.parts[-1].specs, {}, self.devices[0]
        head = self.head
        if head and head not in specs:  # it may compute with the weight of another one
            head = self.plan.layers[head].shape.tied_to
        if head in specs and stream is not None and calibration is not None:
            blocks = [block.path for block in self.plan.blocks]
            ending = Ending(self.model, blocks, self.head, device, self.numerics.torch_dtype)
            rows = (stream.quantized_NTD, calibration.tokens_NT, calibration.valid_NT)
            media, size = Media(calibration.extras), self.recipe.batch_size
            inputs = ending.head_inputs(*(each[:MOMENT_ROWS] for each in rows), batch_size=size, media=media)
            moments[head] = mean_square(inputs)
        weights = ((path, read_weight(self.model, path, device=device)) for path in specs)
        return {path: self._tuner.quantize_layer(path, own, specs[path], moments.get(path)) for path, own in weights}

    def _captured(self, calibration: Calibration | None, start: int) -> tuple[tuple[CallTemplate, ...], Stream | None]:
        """How every block is called, and what flows into block ``start``; nothing where there is no data."""
        if calibration is None:
            return (), None
        self.meter.phase("calibration", f"capturing the calls of all blocks; activations lie {self.place}")
        home = self.place.home
        captured = capture(
            self.model,
            calibration.tokens_NT.to(home),
            calibration.valid_NT.to(home),
            batch_size=self.recipe.batch_size,
            media=Media(calibration.extras),
            device=self.devices[0],
            dtype=self.numerics.torch_dtype,
        )
        if start == 0:
            return captured.templates, self.place.first(self.journal.activations, captured.hidden_NTD)
        return captured.templates, self._kept(start)

    def _kept(self, start: int) -> Stream:
        """What flows into a block, as the first rank kept it."""
        slots, first = self.journal.activations, self.ranks.rank == 0
        stream = self.place.again(slots, start) if first else None
        heads = self.ranks.tell([(rows.shape, rows.dtype) for rows in stream or ()])
        if stream is None:
            empty = self.place.empty(slots, start - 1)
            stream = Stream(
                *(empty(name, *head, self.place.home) for name, head in zip(Stream._fields, heads, strict=True))
            )
        self.ranks.share([0] * len(heads), stream)
        return stream


def _stats(losses_K: Tensor) -> dict[str, float]:
    if not len(losses_K):
        return {}
    return {"loss_first": float(losses_K[0]), "loss_best": float(losses_K.min()), "loss_last": float(losses_K[-1])}
