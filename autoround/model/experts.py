"""Mixtures of experts in the structure of a model: stacks of matrices, and the routers that choose among them."""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from autoround.func.block import stack_paths, transposed_weights
from autoround.model.blocks import structure
from autoround.model.names import written_names
from autoround.model.oddities import is_router
from autoround.plan import BlockShape, LayerShape, Structure

ROUTER = "it routes tokens"


def describe(skeleton: PreTrainedModel) -> Structure:
    """The structure of a model with its experts and routers.

    Raises:
        ModelError: no blocks are found.
    """
    found = structure(skeleton)
    parts = {name: len(pieces[0]) for name, pieces in written_names(skeleton).stacked.items()}
    return replace(found, blocks=tuple(_with_experts(skeleton, block, parts) for block in found.blocks))


def _with_experts(skeleton: PreTrainedModel, block: BlockShape, parts: dict[str, int]) -> BlockShape:
    block = replace(
        block, layers=tuple(replace(layer, fixed=ROUTER) if is_router(layer.path) else layer for layer in block.layers)
    )
    module = skeleton.get_submodule(block.path)
    stacks = [f"{block.path}.{path}" for path in stack_paths(module)]
    if not stacks:
        return block
    routers = {path: shape for stack in stacks for path, shape in _routers(skeleton, stack.rpartition(".")[0])}
    turned = {f"{block.path}.{name}" for name in transposed_weights(module)}
    linear = tuple(replace(layer, fixed=ROUTER) if layer.path in routers else layer for layer in block.layers)
    known = {layer.path for layer in linear}
    others = tuple(
        LayerShape(path=path, out_features=rows, in_features=columns, fixed=ROUTER)
        for path, (rows, columns) in routers.items()
        if path not in known
    )
    experts = tuple(_stack(skeleton.get_parameter(path), path, parts.get(path), f"{path}.weight" in turned)
                    for path in stacks)  # fmt: skip
    return replace(block, layers=(*linear, *others, *experts))


def _stack(parameter: nn.Parameter, path: str, parts: int | None, turned: bool) -> LayerShape:
    experts, rows, columns = parameter.mT.shape if turned else parameter.shape
    return LayerShape(
        path=path,
        out_features=experts * rows,
        in_features=columns,
        experts=experts,
        parts=parts or 1,
        whole=not parts,
    )


def _routers(skeleton: PreTrainedModel, experts: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Modules beside the experts with a row for each of them, or with a single one for experts that all tokens take."""
    parent = experts.rpartition(".")[0]
    count = len(next(skeleton.get_submodule(experts).parameters(recurse=False)))
    for name, module in skeleton.get_submodule(parent).named_children():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.ndim == 2 and len(weight) in (1, count):
            rows, columns = weight.shape
            yield f"{parent}.{name}", (rows, columns)
