"""Passes of a block over all rows, without gradients: what it returns, and what its layers are given."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from autoround import func
from autoround.activations import Inputs
from autoround.backends.base import Numerics
from autoround.data.tokens import Calibration
from autoround.func import observe
from autoround.func.experts import in_even_groups
from autoround.func.types import BlockFunction
from autoround.model.calls import CallTemplate
from autoround.model.capture import Captured, capture
from autoround.model.load import OpenModel
from autoround.model.media import Media
from autoround.placement import sharers
from autoround.ranks import ALONE, Ranks, owners, summed
from autoround.recipe import Recipe

# Rows of an expert come in multiples of this many on a CPU, whose library of products prepares each new size anew.
EXPERT_ROWS = 32
# Tokens that pass through a dense block together on a CPU: caches hold what lies between its layers, and the heap what
# they compute. Of experts each would get few.
CPU_TOKENS = 512
# Rows that the clip search weighs input channels by; for experts, which take few tokens each, all rows count.
MOMENT_ROWS = 32
# Whole numbers below it are exact in float32, in which ranks tell each other sums.
WHOLE = 2**24

Room = Callable[[Sequence[int], torch.dtype, torch.device], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """How rows pass through blocks.

    Attributes:
        batch_size: rows that one device passes, and one rank; some of them together (``at_once``).
        devices: where blocks run; several take turns.
        ranks: processes that share the rows.
    """

    batch_size: int
    devices: Sequence[torch.device]
    ranks: Ranks

    def outputs(
        self, block_fn: func.BlockFn, tensors: Mapping[str, Tensor], template: CallTemplate, x_NTD: Tensor, room: Room
    ) -> Tensor:
        """The block's outputs for all rows, where the rows live, in the dtype that the block returns.

        Ranks compute whole batches, so that what flows in with a row does not depend on their number.

        Args:
            block_fn: the lifted block.
            tensors: all its tensors, on the first device.
            template: how it is called.
            x_NTD: the rows that flow in.
            room: makes the tensor for what flows out.
        """
        devices = sharers(block_fn, self.devices)
        y_NTD, copies = torch.empty(0), replicas(tensors, devices)
        batches = torch.arange(len(x_NTD)).split(self.batch_size)
        shared = self.ranks.size if len(batches) >= self.ranks.size else 1  # else each computes all
        owned = owners(len(batches), shared)
        mine = [rows_B for rows_B, owner in zip(batches, owned, strict=True) if owner == self.ranks.rank or shared == 1]
        with torch.no_grad():
            for batch_B, device in zip(mine, itertools.cycle(devices), strict=False):
                for rows_B in at_once(batch_B, block_fn, x_NTD, device):
                    y_BTD = block_fn(copies[device], bound(template, x_NTD, rows_B, device))
                    y_NTD = y_NTD if len(y_NTD) else room((len(x_NTD), *y_BTD.shape[1:]), y_BTD.dtype, x_NTD.device)
                    y_NTD[rows_B] = y_BTD.to(y_NTD.device)
        if shared > 1:
            self.ranks.share(owned, y_NTD.split(self.batch_size))
        return y_NTD

    def observe(
        self,
        block_fn: func.BlockFn,
        tensors: Mapping[str, Tensor],
        specs: Mapping[str, func.WeightSpec],
        inputs: Inputs,
        *,
        rows: int,
        gram: observe.Gram | None,
        parts: int,
    ) -> observe.Observed:
        """What the block's layers are given, as far as anybody asks; ranks share the parts.

        Args:
            block_fn: the lifted block.
            tensors: all its tensors, on the first device.
            specs: of the layers to observe.
            inputs: what flows in.
            rows: how many of them, from the first on.
            gram: sums up their Hessians, where those are asked for.
            parts: into how many the rows are divided at most; they decide the order in which is added up.
        """
        if not rows:
            return observe.Observed({}, {}, {})
        x_NTD, valid_NT, home = inputs.stream.quantized_NTD, inputs.valid_NT, sharers(block_fn, self.devices)[0]
        batches = torch.arange(rows).split(self.batch_size)

        def calls(own: Sequence[Tensor]) -> Iterator[tuple[func.Call, Tensor]]:
            for rows_B in (rows_B for batch_B in own for rows_B in at_once(batch_B, block_fn, x_NTD, home)):
                yield bound(inputs.template, x_NTD, rows_B, home), valid_NT[rows_B].to(home)

        count = min(parts, len(batches))
        bounds = [len(batches) * part // count for part in range(count + 1)]
        divided = [calls(batches[first:last]) for first, last in itertools.pairwise(bounds)]
        shared = count >= self.ranks.size and valid_NT.numel() < WHOLE
        total = partial(summed, self.ranks if shared else ALONE)
        return observe.observe_parts(block_fn, tensors, divided, specs, gram=gram, total=total)


def observed_rows(recipe: Recipe, rows: int, *, stacked: bool) -> int:
    """How many rows a block is run on to see what its layers are given.

    Args:
        rows: how many there are.
        stacked: whether the block holds a mixture of experts.
    """
    if stacked or recipe.compensates:
        return rows
    return min(rows, MOMENT_ROWS) if recipe.searches_clips else 0


def gram_of(dtype: torch.dtype) -> observe.Gram:
    """How the Hessians of layers are summed up whose inputs are of a dtype.

    Products of bfloat16's numbers are exact, and are added up in float32, where a processor multiplies in bfloat16; so
    are those that a GPU multiplies in TF32.
    """
    return _gram_of_bfloat16 if dtype == torch.bfloat16 else observe.add_gram


def _gram_of_bfloat16(sum_II: Tensor, x_MI: Tensor) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        observe.add_gram(sum_II, x_MI)
    finally:
        torch.set_float32_matmul_precision(before)


def captured(
    model: OpenModel,
    calibration: Calibration,
    numerics: Numerics,
    *,
    batch_size: int,
    home: torch.device,
    device: torch.device,
) -> Captured:
    """How every block is called for the calibration rows, and what flows into the first one, where the rows live."""
    return capture(
        model,
        calibration.tokens_NT.to(home),
        calibration.valid_NT.to(home),
        batch_size=batch_size,
        media=Media(calibration.extras),
        device=device,
        dtype=numerics.torch_dtype,
    )


def evened(block_fn: func.BlockFn, numerics: Numerics) -> BlockFunction:
    """The block, on a CPU with the rows of its experts in multiples."""
    return in_even_groups(block_fn, EXPERT_ROWS) if numerics.device == "cpu" else block_fn


def at_once(rows_B: Tensor, block_fn: func.BlockFn, x_NTD: Tensor, device: torch.device) -> Sequence[Tensor]:
    """The rows of a batch that pass through a block together."""
    if device.type != "cpu" or block_fn.stacks:
        return [rows_B]
    return rows_B.split(max(1, CPU_TOKENS // x_NTD.shape[1]))


def bound(template: CallTemplate, x_NTD: Tensor, rows_B: Tensor, device: torch.device) -> func.Call:
    """The call of a block for some rows, on a device."""
    return template.bind(taken(x_NTD, rows_B).to(device), rows_B)


def taken(all_N: Tensor, rows_B: Tensor) -> Tensor:
    """Some rows, copied one by one: indexing finds the place of every element, which takes 4 times as long."""
    return all_N.index_select(0, rows_B.to(all_N.device))


def replicas(tree: Any, devices: Sequence[torch.device]) -> dict[torch.device, Any]:
    """A tree of tensors on each device; the first one has it already, or its parts are where they compute."""
    home, *others = dict.fromkeys(devices)
    return {home: tree, **{device: tree_map(lambda leaf, own=device: leaf.to(own), tree) for device in others}}
