"""What flows from block to block, and where it lies: in memory, or in memory-mapped files of the journal.

Legend: N samples, T tokens, D hidden size. Where rows lie makes no difference to any result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from autoround.model.blocks import embedding
from autoround.model.calls import CallTemplate
from autoround.model.load import OpenModel
from autoround.recipe import Recipe
from autoround.slots import Slots

# Share of the free memory that rows may take: the rest is for the block that is tuned.
SHARE = 0.5


class Empty(Protocol):
    """Makes a tensor for rows that flow out of a block."""

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor: ...


def in_memory(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor in the memory of a device."""
    del name  # files have names
    return torch.empty(tuple(shape), dtype=dtype, device=device)


class Stream(NamedTuple):
    """What flows from block to block.

    Attributes:
        float_NTD: outputs of the float blocks; empty where no steps need targets.
        quantized_NTD: outputs of the quantized blocks.
    """

    float_NTD: Tensor
    quantized_NTD: Tensor


class Inputs(NamedTuple):
    """What a block is tuned on: its calls, the rows that flow in, which tokens count, and room for what flows out.

    Of a block that is tuned apart from the ones after it, ``target_NTD`` is what its float weights make of the rows.
    """

    template: CallTemplate
    stream: Stream
    valid_NT: Tensor
    empty: Empty = in_memory
    target_NTD: Tensor | None = None


def overwrites(recipe: Recipe) -> bool:
    """Whether rows that flow out of a block take the place of those that flowed in, where these are in memory.

    Blocks that are tuned apart need theirs afterwards, and so do experts that get all tokens, for targets of their own.
    """
    return recipe.parallel != "blocks" and recipe.starved_experts != "route_all"


def copies(recipe: Recipe) -> int:
    """How many times all rows are there at once: quantized ones, float ones for targets, and what becomes of both."""
    return (2 if recipe.iters else 1) * (1 if overwrites(recipe) else 2)


def memory_for(recipe: Recipe, stream: Stream) -> Empty:
    """What makes room in memory for rows that flow out of a block: the place of alike ones that flow in, if it may."""
    if not overwrites(recipe):
        return in_memory

    def place(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        rows = getattr(stream, name)
        both = name == "float_NTD" and rows is stream.quantized_NTD  # as into the first block
        return (in_memory if both else instead_of(rows))(name, shape, dtype, device)

    return place


def instead_of(rows: Tensor) -> Empty:
    """What makes room in the place of rows that flow in, where those that flow out are alike."""

    def place(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        alike = (rows.shape, rows.dtype, rows.device) == (torch.Size(shape), dtype, device)
        return rows if alike else in_memory(name, shape, dtype, device)

    return place


@dataclass(frozen=True, slots=True)
class Place:
    """Where rows lie.

    Attributes:
        home: the device whose memory they are in, or that of the host where they are in files.
        on_disk: whether they are in files.
    """

    home: torch.device
    on_disk: bool = False

    def __str__(self) -> str:
        return "in files of the journal" if self.on_disk else f"in memory ({self.home.type})"

    def first(self, slots: Slots, hidden_NTD: Tensor) -> Stream:
        """What flows into the first block, from captured hidden states."""
        if self.on_disk:
            hidden_NTD = slots.make(-1, "hidden_NTD", hidden_NTD.shape, hidden_NTD.dtype).copy_(hidden_NTD)
        return Stream(hidden_NTD, hidden_NTD)

    def again(self, slots: Slots, index: int) -> Stream:
        """What flows into a block, as it was kept after the block before it.

        Raises:
            JournalError: it is missing or damaged.
        """
        kept = slots.read(index - 1)
        return Stream(*(kept[name].to(self.home, copy=not self.on_disk) for name in Stream._fields))

    def roomier(self) -> "Place | None":
        """Where rows take less of the memory that is scarce; None where they lie in files already."""
        if self.on_disk:
            return None
        host = torch.device("cpu")
        return Place(host, on_disk=self.home == host)

    def moved(self, slots: Slots, stream: Stream) -> Stream:
        """Float rows, which were not kept, brought here from elsewhere.

        Raises:
            JournalError: the disk is full.
        """
        if self.on_disk:
            return self.first(slots, stream.float_NTD)
        return Stream(*(rows.to(self.home) for rows in stream))

    def empty(self, slots: Slots, index: int, memory: Empty = in_memory) -> Empty:
        """What makes room for rows that flow out of a block.

        Args:
            slots: files for rows.
            index: of the block.
            memory: what makes it where rows are in memory.
        """
        if not self.on_disk:
            return memory

        def mapped(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
            del device  # the host's
            return slots.make(index, name, shape, dtype)

        return mapped


def choose_place(recipe: Recipe, model: OpenModel, dtype: torch.dtype, device: torch.device, free: int) -> Place:
    """Where rows lie: as the recipe says, or in files where they would take too much of the memory.

    Args:
        recipe: the settings.
        model: the opened model, of which the hidden size counts.
        dtype: of the rows.
        device: where blocks run; rows that its own memory holds are never put on the disk unasked.
        free: bytes that this process may still take.
    """
    host = torch.device("cpu")
    home = host if recipe.low_gpu_mem_usage else device
    if not recipe.needs_data or recipe.activations == "ram":
        return Place(home)
    if recipe.activations == "disk":
        return Place(host, on_disk=True)
    rows = recipe.nsamples * recipe.seqlen * embedding(model.skeleton).in_features * dtype.itemsize
    return Place(home, on_disk=home == host and copies(recipe) * rows > SHARE * free)
