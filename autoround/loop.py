"""The one loop over blocks: read, tune, journal, and begin a block again with less at a time where memory runs out."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from autoround import func
from autoround.activations import Inputs, Place, Stream, memory_for
from autoround.backends.base import Backend, Numerics
from autoround.backends.host import trim_heap
from autoround.backends.products import float32_products
from autoround.coverage import token_stats, told
from autoround.data.tokens import Calibration
from autoround.errors import AutoRoundError, JournalError, ModelError
from autoround.journal import Journal
from autoround.log import LOGGER
from autoround.model.calls import CallTemplate
from autoround.model.finish import Ending, mean_square, read_weight
from autoround.model.load import OpenModel
from autoround.model.media import Media
from autoround.model.read import BlockReader
from autoround.numerics import divided, ran_out
from autoround.passes import MOMENT_ROWS, Passes, captured
from autoround.placement import SpreadFn, as_named, fitted
from autoround.plan import Plan
from autoround.precision import Dtypes, cast, held_dtypes
from autoround.progress import BlockDone, Meter
from autoround.ranks import ALONE, Ranks, compare, turns
from autoround.recipe import Recipe
from autoround.tuner import BlockTuner, Tuned


@dataclass(kw_only=True)
class BlockLoop:
    """Work on the blocks that a journal does not have yet.

    Attributes:
        recipe: the settings.
        model: the opened model.
        plan: the fate of every weight.
        head: path of the output head; empty where there is none.
        backend: of the devices.
        devices: where blocks run; more than one share the rows of a step, or the modules of a block.
        journal: what is done, and what flows into the next block.
        meter: is told of the work.
        numerics: how to compute; other ones where memory ran out.
        place: where activations lie; another one where memory ran out.
        ranks: processes that do the same work, and share the rows of it.
        named: module path -> device, where the user said so; blocks then stay on the devices named.
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
    named: Mapping[str, torch.device]

    def __post_init__(self) -> None:
        self._tuner = self._make_tuner()
        paths = [block.path for block in self.plan.blocks]
        self._reader = BlockReader(self.model, paths, ahead=self.devices[0].type != "cpu")

    def run(self, calibration: Calibration | None, start: int) -> Iterator[BlockDone]:
        """Tune the blocks from ``start`` on, and what comes after them; one event for each that is done.

        Raises:
            AutoRoundError: a block cannot be tuned or kept; names the layer or the file.
        """
        blocks, count = self.plan.blocks, len(self.plan.parts)
        self._calibration = calibration
        home = self.devices[0]
        with float32_products(home):
            self._capture(calibration, start)
        for turn in turns(start, len(blocks), self.ranks.size if self._apart else 1):
            with float32_products(home):
                tuned = self._tuned(turn)
            for index, codes, stats in self._done(turn, tuned):
                self.journal.write_block(index, codes, stats)
                yield self.meter.end(index, blocks[index].path, told(stats))
            if self._stream is not None:  # else it is not worth the time
                trim_heap()
        if len(blocks) < count:
            title = self.plan.parts[-1].title
            self.meter.begin(len(blocks), title)
            with float32_products(home):
                codes = self._outside(calibration)
            compare(self.ranks, title, codes)
            self.journal.write_block(len(blocks), codes, {})
            yield self.meter.end(len(blocks), title, {})

    @property
    def _apart(self) -> bool:
        """Whether blocks are tuned on float rows, each by one rank; else all ranks share the rows of each block."""
        return self.recipe.parallel == "blocks"

    @property
    def _dtypes(self) -> Dtypes:
        return held_dtypes(self.model.skeleton, self.numerics.torch_dtype)

    def _make_tuner(self) -> BlockTuner:
        recipe = self.recipe
        tokens = recipe.batch_size * recipe.gradient_accumulate_steps * recipe.seqlen
        return BlockTuner(
            recipe,
            self.numerics,
            self.devices,
            on_step=lambda done, loss: self.meter.step(done, tokens, loss),
            ranks=ALONE if self._apart else self.ranks,
            dtypes=self._dtypes,
        )

    def _tuned(self, turn: range) -> Tuned | None:
        """This rank's block, begun again where memory runs out and something can be changed; what flows on is kept."""
        while True:
            try:
                tuned, self._stream = self._attempt(turn)
                return tuned
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._with_less(turn[0], cause)  # the failed attempt's tensors are gone by now

    def _attempt(self, turn: range) -> tuple[Tuned | None, Stream | None]:
        """This rank's block, where it has one, and what flows into the next turn."""
        own = next((index for index in turn if not self._apart or self._owner(index) == self.ranks.rank), None)
        shown = turn[0] if own is None else own
        self.meter.begin(shown, self.plan.blocks[shown].path)
        inputs, stream = self._flow(turn, own)
        if own is None:
            return None, stream
        with self._opened(own) as (block_fn, tensors):
            tuned = self._tuner.tune(own, block_fn, tensors, self.plan.blocks[own].specs, inputs)
        return tuned, stream if self._apart else tuned.stream

    def _flow(self, turn: range, own: int | None) -> tuple[Inputs | None, Stream | None]:
        """What one of the blocks is tuned on, and, where they are tuned apart, what flows out of the last one."""
        found, stream = None, self._stream
        for index in turn if stream is not None else ():
            empty = self.place.empty(self.journal.activations, index, memory_for(self.recipe, stream))
            inputs = Inputs(self._templates[index], stream, self._valid_NT, empty)
            if self._apart:
                y_NTD = self._passed(index, inputs)
                inputs, stream = inputs._replace(target_NTD=y_NTD), Stream(y_NTD, y_NTD)
            found = inputs if index == own else found
        return found, stream

    def _passed(self, index: int, inputs: Inputs) -> Tensor:
        """What the float block returns; ranks share the rows."""
        passes = Passes(batch_size=self.recipe.batch_size, devices=self.devices, ranks=self.ranks)
        with self._opened(index) as (block_fn, tensors):
            own, room = cast(tensors, self._dtypes), partial(inputs.empty, "float_NTD")
            return passes.outputs(block_fn, own, inputs.template, inputs.stream.float_NTD, room)

    @contextmanager
    def _opened(self, index: int) -> Iterator[tuple[func.BlockFn, dict[str, Tensor]]]:
        """A block and its tensors, on the first device or spread over all; errors name it."""
        path = self.plan.blocks[index].path
        try:
            block_fn = func.make_block_fn(self.model.skeleton.get_submodule(path))
            if self.named:
                block_fn = as_named(block_fn, path, self.named, self.devices[0])
            else:
                block_fn = fitted(block_fn, self.recipe, self.backend, self.devices)
            if isinstance(block_fn, SpreadFn):
                yield block_fn, block_fn.sent(self._reader.read(path))
            else:
                tensors = self._reader.read(path)
                yield block_fn, {name: tensor.to(self.devices[0]) for name, tensor in tensors.items()}
        except JournalError:  # names a file, not a layer
            raise
        except AutoRoundError as error:
            raise type(error)(f"{path}.{error}") from error

    def _owner(self, index: int) -> int:
        return index % self.ranks.size

    def _done(
        self, turn: range, tuned: Tuned | None
    ) -> Iterator[tuple[int, Mapping[str, func.Codes], dict[str, float]]]:
        """The blocks of a turn, with their codes and numbers to keep, as all ranks know them."""
        own = None if tuned is None else (tuned.codes, _stats(tuned.losses_K) | token_stats(tuned.tokens))
        if self._apart:
            own = tree_map_only(Tensor, lambda tensor: tensor.to("cpu", copy=True), own)
            for index in turn:
                codes, stats = self.ranks.tell(own, self._owner(index))
                yield index, codes, stats
        elif own is not None:
            index, path = turn[0], self.plan.blocks[turn[0]].path
            compare(self.ranks, path, own[0])
            if self._stream is not None and index + 1 < len(self.plan.parts):
                self.journal.activations.write(index, self._stream._asdict())
            yield index, *own

    def _with_less(self, index: int, cause: str) -> None:
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
        if self._stream is not None and (finer := divided(self.numerics, self.recipe)):
            change = f"steps in {finer.micro_batches} parts, not {self.numerics.micro_batches}"
            self.numerics = finer
            self.journal.record(numerics=dataclasses.asdict(finer))
        elif self._stream is not None and (place := self.place.roomier()):
            change = f"activations {place}, not {self.place}"
            self.place = place
            if self._apart:
                self._stream = place.moved(self.journal.activations, self._stream)
        else:
            raise ModelError(
                f"{path}: memory ran out ({cause}) with as little of it in use as settings allow; needed more; use a "
                "smaller --seqlen or --batch_size, or another --device_map"
            )
        LOGGER.warning("%s: memory ran out (%s); begins again with %s", path, cause, change)
        self._tuner = self._make_tuner()
        self.backend.release_memory()
        if not self._apart:  # the attempt may have written over what flows in
            self._stream = None
            if index:
                self._stream = self._kept(index)
            else:
                self._capture(self._calibration, index)

    def _outside(self, calibration: Calibration | None) -> dict[str, func.Codes]:
        """Codes of the layers outside the blocks; only the head's inputs are known."""
        stream = self._stream
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

    def _capture(self, calibration: Calibration | None, start: int) -> None:
        """Learn how every block is called, and what flows into block ``start``; nothing where there is no data."""
        self._templates: Sequence[CallTemplate] = ()
        self._stream: Stream | None = None
        if calibration is None:
            return
        self.meter.phase("calibration", f"capturing the calls of all blocks; activations lie {self.place}")
        self._valid_NT = calibration.valid_NT
        size, home, device = self.recipe.batch_size, self.place.home, self.devices[0]
        hidden_NTD, self._templates = captured(
            self.model, calibration, self.numerics, batch_size=size, home=home, device=device
        )
        if start and not self._apart:
            self._stream = self._kept(start)
            return
        self._stream = self.place.first(self.journal.activations, hidden_NTD)
        if start:
            self.meter.phase("calibration", "passing rows through finished blocks")
            _, self._stream = self._flow(range(start), None)

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
