"""After the last block: the scales of all blocks together, tuned to what the float model predicts.

Blocks are tuned for their own outputs, each by itself; what their errors together do to the model's predictions none of
them sees. A step here passes some rows through all rounded blocks, takes the KL divergence from the float model's
predictions, and pulls its gradient back through the blocks to their scales. Codes stay as they are.

Legend: N samples, B samples in a step, T tokens, D hidden size, C tokens whose logits are compared at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from autoround import func
from autoround.activations import Empty, in_memory, instead_of
from autoround.backends.base import Numerics, jit
from autoround.backends.host import KEPT_BYTES, trim_heap
from autoround.backends.products import float32_products
from autoround.beside import beside
from autoround.data.tokens import Calibration
from autoround.errors import ModelError
from autoround.journal import Journal
from autoround.model.calls import CallTemplate
from autoround.model.load import OpenModel
from autoround.model.outputs import Outputs, chunk_tokens, count_items
from autoround.model.read import read_block
from autoround.numerics import ran_out
from autoround.passes import Passes, bound, captured, evened
from autoround.plan import Plan
from autoround.progress import Meter
from autoround.ranks import ALONE
from autoround.recipe import Recipe
from autoround.schedule import batch_rows, scale_optimizer

# Rows of a step at most: of as many tokens, more steps of fewer rows reach a lower KL divergence, down to two.
ROWS = 2


@dataclass(kw_only=True)
class _Part:
    """A block, and what is learned of it."""

    template: CallTemplate
    rounded: func.RoundedBlock
    apply: Callable[..., Tensor]
    pull: Callable[..., tuple[Any, Tensor]]
    factors: dict[str, dict[str, Tensor]]
    optimizers: dict[str, func.Transform]
    states: dict[str, Any]

    def update(self, grads: Mapping[str, Any]) -> None:
        """One step of each layer's optimizer."""
        for path, optimizer in self.optimizers.items():
            updates, self.states[path] = optimizer.update(grads[path], self.states[path], self.factors[path])
            self.factors[path] = func.apply_updates(self.factors[path], updates)
        self.factors = func.keep_near(self.factors)


@dataclass(kw_only=True)
class ScaleTuner:
    """Tunes the scales of a journal's blocks. Memory holds the codes of all of them, a byte for each weight.

    Attributes:
        recipe: the settings.
        model: the float model.
        plan: the fate of its layers.
        numerics: how it computes.
        device: where.
        home: whose memory holds the rows.
        journal: whose blocks are all done.
        meter: is told of the work.
    """

    recipe: Recipe
    model: OpenModel
    plan: Plan
    numerics: Numerics
    device: torch.device
    home: torch.device
    journal: Journal
    meter: Meter

    def __post_init__(self) -> None:
        self._dtype = self.numerics.torch_dtype
        self._compiled: dict[Any, tuple[Any, Any]] = {}

    def run(self, calibration: Calibration) -> dict[int, dict[str, func.Codes]]:
        """Take all steps.

        Args:
            calibration: what the blocks were tuned on.

        Returns:
            Number of a block -> layer path relative to the block -> codes with scales as they are to be stored.

        Raises:
            ModelError: memory ran out, or a loss is not finite.
        """
        try:
            with float32_products(self.device):
                return self._run(calibration)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            raise ModelError(
                f"scale_steps: memory ran out ({str(error).strip() or type(error).__name__}); needed room for the "
                "codes of all blocks and for what flows into each; use fewer --scale_steps, --low_gpu_mem_usage on an "
                "accelerator, or --scale_steps 0: finished blocks are kept"
            ) from error

    def _run(self, calibration: Calibration) -> dict[int, dict[str, func.Codes]]:
        steps, calibration = self.recipe.scale_steps, calibration.first(used_rows(self.recipe))
        valid_NT = calibration.valid_NT
        self.meter.phase("scales", "passing rows through the float blocks")
        first_NTD, target_NTD, parts, items = self._open(calibration)
        outputs = Outputs(self.model, self.device, self._dtype, items=items)
        batches = batch_rows(self.recipe.seed, len(parts), len(valid_NT), scale_rows(self.recipe), steps)
        for step, rows_B in enumerate(batches, start=1):
            loss = self._step(parts, outputs, first_NTD, target_NTD, valid_NT, rows_B)
            if not loss < float("inf"):
                raise ModelError(
                    f"scale_steps: found a loss of {loss} at step {step}; needed a finite one; use --scale_steps 0"
                )
            self.meter.scales(step, steps, loss)
            if self.device.type == "cpu":
                trim_heap(KEPT_BYTES)
        # codes come from the disk, factors from the device
        return {index: func.store_scales(self.journal.read_codes(index), tree_map(Tensor.cpu, part.factors))
                for index, part in enumerate(parts)}  # fmt: skip

    def _step(
        self,
        parts: Sequence[_Part],
        outputs: Outputs,
        first_NTD: Tensor,
        target_NTD: Tensor,
        valid_NT: Tensor,
        rows_B: Tensor,
    ) -> float:
        """One step over some rows; their loss before it."""
        flows, x_BTD = [], first_NTD[rows_B].to(self.device)
        with torch.no_grad():
            for part in parts:
                flows.append(x_BTD)
                x_BTD = part.apply(part.rounded, part.factors, part.template.bind(x_BTD, rows_B))
        loss, cotangent_BTD = self._compare(outputs, x_BTD, target_NTD[rows_B], valid_NT[rows_B])
        for part in reversed(parts):
            call = part.template.bind(flows.pop(), rows_B)
            grads, cotangent_BTD = part.pull(part.rounded, part.factors, call, cotangent_BTD)
            part.update(grads)
        return loss

    def _compare(self, outputs: Outputs, x_BTD: Tensor, target_BTD: Tensor, valid_BT: Tensor) -> tuple[float, Tensor]:
        """Mean KL divergence over the valid tokens, and its gradient with respect to what the last block returns."""
        valid_BT = valid_BT.to(x_BTD.device)
        own_PD, float_PD = x_BTD[valid_BT], target_BTD.to(x_BTD.device)[valid_BT]
        grads, losses = [], []
        chunk = chunk_tokens(self.model)
        for own_CD, float_CD in zip(*(torch.split(each, chunk) for each in (own_PD, float_PD)), strict=True):
            with torch.no_grad():
                expected_CV = outputs.log_probabilities(float_CD)
            own_CD = own_CD.detach().requires_grad_()
            found_CV = outputs.log_probabilities(own_CD)
            loss = torch.nn.functional.kl_div(found_CV, expected_CV, reduction="sum", log_target=True) / len(own_PD)
            grads.append(torch.autograd.grad(loss, own_CD)[0])
            losses.append(loss.detach())
        cotangent_BTD = torch.zeros_like(x_BTD)
        cotangent_BTD[valid_BT] = torch.cat(grads)
        return float(torch.stack(losses).sum()), cotangent_BTD

    def _open(self, calibration: Calibration) -> tuple[Tensor, Tensor, list[_Part], int]:
        """What flows into the first block and out of the last float one, the rounded blocks, and what they return."""
        size, home, device = self.recipe.batch_size, self.home, self.device
        first_NTD, templates = captured(
            self.model, calibration, self.numerics, batch_size=size, home=home, device=device
        )
        passes = Passes(batch_size=scale_rows(self.recipe), devices=[device], ranks=ALONE)
        target_NTD, parts, items = first_NTD, list[_Part](), list[int]()
        room: Empty = in_memory
        ahead: list[Callable[[], object]] = []
        for index, template in enumerate(templates):
            path = self.plan.blocks[index].path
            block_fn = func.make_block_fn(self.model.skeleton.get_submodule(path))
            counted = count_items(block_fn.skeleton, items)
            tensors = read_block(self.model, path, dtype=self._dtype, device=self.device)
            target_NTD = passes.outputs(block_fn, tensors, template, target_NTD, partial(room, "float_NTD"))
            room = instead_of(target_NTD)
            counted.remove()
            parts.append(self._part(index, block_fn, template, tensors))
            if index == 0 and self.numerics.compiler:
                ahead.append(beside(partial(self._compile, parts[0], first_NTD)))
        for compiled in ahead:
            compiled()
        return first_NTD, target_NTD, parts, items[-1]

    def _compile(self, part: _Part, x_NTD: Tensor) -> None:
        """Compile for blocks like this one, beside the float blocks: a step over it that is thrown away."""
        torch.set_num_threads(self.numerics.threads)  # compiled code is for so many
        rows_B = torch.arange(min(scale_rows(self.recipe), len(x_NTD)))
        call = bound(part.template, x_NTD, rows_B, self.device)
        with torch.no_grad():
            y_BTD = part.apply(part.rounded, part.factors, call)
        part.pull(part.rounded, part.factors, call, torch.zeros_like(y_BTD))

    def _part(self, index: int, block_fn: func.BlockFn, template: CallTemplate, tensors: Mapping[str, Tensor]) -> _Part:
        specs, codes = self.plan.blocks[index].specs, self.journal.read_codes(index)
        codes = {path: type(own)(*(_exact(each).to(self.device) for each in own)) for path, own in codes.items()}
        frozen = {name: tensor.clone() for name, tensor in tensors.items() if name.removesuffix(".weight") not in codes}
        factors = func.init_factors(codes)
        optimizers = {path: scale_optimizer(self.recipe.scale_steps, specs[path].bits) for path in codes}
        apply, pull = self._functions(block_fn, specs, template.hidden)
        return _Part(
            template=template,
            rounded=func.RoundedBlock(codes, frozen),
            apply=apply,
            pull=pull,
            factors=factors,
            optimizers=optimizers,
            states={path: optimizer.init(factors[path]) for path, optimizer in optimizers.items()},
        )

    def _functions(self, block_fn: func.BlockFn, specs: Mapping[str, func.WeightSpec], hidden: int) -> tuple[Any, Any]:
        """What applies a block and what pulls gradients back through it, shared by blocks of equal signature."""
        key = (block_fn.signature, *specs.items(), hidden)
        if key not in self._compiled:
            own = evened(block_fn, self.numerics)
            apply = func.make_apply(own, specs, dtype=self._dtype)
            pull = func.make_pull(own, specs, dtype=self._dtype, hidden=hidden)
            compiler = self.numerics.compiler
            self._compiled[key] = (jit(apply, compiler=compiler), jit(pull, compiler=compiler))
        return self._compiled[key]


def scale_rows(recipe: Recipe) -> int:
    """How many rows a step takes."""
    return min(ROWS, recipe.batch_size)


def used_rows(recipe: Recipe) -> int:
    """How many of the rows all steps need, the first ones."""
    return min(recipe.nsamples, recipe.scale_steps * scale_rows(recipe))


def _exact(tensor: Tensor) -> Tensor:
    """Scales in float32, in which they are multiplied: compilers warn of half precisions of two kinds."""
    return tensor.float() if tensor.is_floating_point() else tensor
