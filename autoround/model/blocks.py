"""The structure of a model, found from its modules."""

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from autoround.errors import ModelError
from autoround.func import linear_paths
from autoround.plan import BlockShape, LayerShape, Structure


def find_blocks(skeleton: PreTrainedModel) -> tuple[str, ...]:
    """Paths of the transformer blocks: the items of the decoder's outermost module lists, in definition order.

    Lists of plain layers, such as adapters, are not blocks. ``capture`` checks that the order is that of the calls.

    Raises:
        ModelError: there are none.
    """
    decoder = skeleton.get_decoder()
    prefix = next(path for path, module in skeleton.named_modules() if module is decoder)
    lists: list[str] = []
    for path, module in decoder.named_modules(prefix=prefix):
        nested = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not nested and any(_is_block(item) for item in module):
            lists.append(path)
    blocks = tuple(f"{path}.{index}" for path in lists for index in range(len(skeleton.get_submodule(path))))
    if not blocks:
        raise ModelError(
            f"{type(skeleton).__name__}: found no repeated blocks with linear layers; needed a list of transformer "
            "blocks (nn.ModuleList); this architecture is not supported yet"
        )
    return blocks


def structure(skeleton: PreTrainedModel) -> Structure:
    """Describe the layers of a model for the plan.

    Raises:
        ModelError: no blocks are found.
    """
    blocks = find_blocks(skeleton)
    owners: dict[int, str] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), name.rpartition(".")[0])
    layers = tuple(_shape(skeleton.get_submodule(path), path, owners) for path in linear_paths(skeleton))
    return Structure(
        architecture=type(skeleton).__name__,
        blocks=tuple(
            BlockShape(path=block, layers=tuple(layer for layer in layers if layer.path.startswith(f"{block}.")))
            for block in blocks
        ),
        outside=tuple(layer for layer in layers if not layer.path.startswith(tuple(f"{block}." for block in blocks))),
    )


def embedding(skeleton: PreTrainedModel) -> LayerShape:
    """The embedding of tokens, each row of its weight being one token's."""
    module = skeleton.get_input_embeddings()
    path = next(path for path, each in skeleton.named_modules() if each is module)
    rows, columns = module.get_parameter("weight").shape
    return LayerShape(path=path, out_features=rows, in_features=columns)


def _is_block(module: nn.Module) -> bool:
    paths = linear_paths(module)
    return bool(paths) and "" not in paths


def _shape(layer: nn.Module, path: str, owners: Mapping[int, str]) -> LayerShape:
    weight = layer.get_parameter("weight")
    out_features, in_features = weight.shape if isinstance(layer, nn.Linear) else reversed(weight.shape)
    owner = owners[id(weight)]
    return LayerShape(
        path=path,
        out_features=out_features,
        in_features=in_features,
        tied_to=owner if owner != path else "",
        linear=isinstance(layer, nn.Linear),
    )
