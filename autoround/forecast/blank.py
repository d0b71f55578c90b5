"""A planned run without its weights: tensors of the right shapes, for counting bytes and for timing.

Legend: B samples in a batch, T tokens, D hidden size, N samples.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoround import func
from autoround.data.images import blank_row, completed
from autoround.engine import Run
from autoround.model.calls import CallTemplate, PerSample, Shared
from autoround.model.capture import Captured, capture
from autoround.model.load import OpenModel
from autoround.model.media import Media
from autoround.model.names import Pieces
from autoround.model.record import BlindError
from autoround.model.source import WeightSource
from autoround.precision import Dtypes, held_dtypes

# Rows that show a call with and without its batch axis.
_ROWS = 2


class BlankSource:
    """Stands for a source: zeros that take no memory in place of the weights, and a list of what was asked for."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.asked: set[str] = set()

    def names(self) -> tuple[str, ...]:
        return self._source.names()

    def extra(self) -> tuple[str, ...]:
        return self._source.extra()

    def checkpoint_name(self, name: str) -> str:
        return self._source.checkpoint_name(name)

    def pieces(self, name: str) -> Pieces:
        return self._source.pieces(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def read(self, name: str) -> Tensor:
        self.asked.add(name)
        return torch.zeros((), dtype=self.dtype(name)).expand(self.shape(name))


@dataclass(frozen=True, kw_only=True)
class BlankRun:
    """A run whose model has no weights.

    Attributes:
        run: the planned run.
        model: its model, with a ``BlankSource``.
        templates: how each block is called; none where nothing is learned from data.
        hidden: shape of a row of hidden states, such as (T, D).
        outside: names of the weights outside the blocks that a forward reads.
    """

    run: Run
    model: OpenModel
    templates: tuple[CallTemplate, ...]
    hidden: tuple[int, ...]
    outside: frozenset[str]

    @property
    def flows(self) -> bool:
        """Whether rows flow from block to block while these are quantized."""
        return bool(self.templates) and self.run.recipe.tunes_blocks

    @property
    def dtypes(self) -> Dtypes:
        """Of the tensors of blocks."""
        return held_dtypes(self.model.skeleton, self.run.numerics.torch_dtype)

    def block_fn(self, index: int) -> func.BlockFn:
        """A lifted block."""
        return func.make_block_fn(self.model.skeleton.get_submodule(self.run.plan.blocks[index].path))


def _captured(run: Run, model: OpenModel) -> Captured:
    """The calls of blocks for text, or for an image in every row where some blocks are called for images alone."""
    width, dtype = run.recipe.seqlen, run.numerics.torch_dtype
    tokens_NT = torch.zeros(_ROWS, width, dtype=torch.int64)
    valid_NT = torch.ones(_ROWS, width, dtype=torch.bool)
    try:
        return capture(model, tokens_NT, valid_NT, batch_size=_ROWS, dtype=dtype)
    except BlindError:
        row = blank_row(model.processor(), width)
        tokens_NT[:, : len(row.ids)] = torch.tensor(row.ids)
        media = Media(completed([row] * _ROWS, width))
        return capture(model, tokens_NT, valid_NT, batch_size=_ROWS, dtype=dtype, media=media)


def blank(run: Run) -> BlankRun:
    """Take the weights from a run, and record the calls of its blocks at their true shapes.

    Raises:
        AutoRoundError: the model does not call its blocks as a run needs it.
    """
    source = BlankSource(run.model.source)
    model = dataclasses.replace(run.model, source=source)
    if not (run.recipe.needs_data and run.plan.specs):
        return BlankRun(run=run, model=model, templates=(), hidden=(), outside=frozenset())
    captured = _captured(run, model)
    return BlankRun(
        run=run,
        model=model,
        templates=captured.templates,
        hidden=tuple(captured.hidden_NTD.shape[1:]),
        outside=frozenset(source.asked),
    )


def mapped(template: CallTemplate, change: Any) -> CallTemplate:
    """A template with every tensor changed by a function."""

    def leaf(own: Any) -> Any:
        if isinstance(own, Shared):
            return Shared(change(own.tensor))
        if isinstance(own, PerSample):
            return own._replace(slices=tuple(map(change, own.slices)))
        return own

    return CallTemplate(tuple(map(leaf, template.leaves)), template.spec)
