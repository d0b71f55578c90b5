"""The structure of a model, found from its modules."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from autoround.errors import ModelError
from autoround.func import linear_paths
from autoround.model.reads import read_directly
from autoround.model.skeleton import sees_images
from autoround.plan import BlockShape, LayerShape, Structure

_NO_MATRIX = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_READ_ITSELF = "the model computes with its weight without calling it"
_SHARED = "several blocks share its weight"


def find_blocks(skeleton: PreTrainedModel) -> tuple[str, ...]:
    """Paths of the transformer blocks: the items of the decoder's outermost module lists, in definition order.

    Where what transformers takes for the decoder has none, those of the whole model are meant. Lists of plain layers,
    such as adapters, are not blocks, nor are those of towers inside the decoder. ``capture`` checks that the order is
    that of the calls.

    Raises:
        ModelError: there are none.
    """
    prefix, towers = _decoder_path(skeleton), _towers(skeleton)
    lists = _lists(skeleton.get_submodule(prefix), prefix) or _lists(skeleton, "")
    lists = [path for path in lists if not path.startswith(towers)]
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
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name.rpartition(".")[0])
    fixed = {path: _READ_ITSELF for path in read_directly(skeleton)}
    text, head = f"{_decoder_path(skeleton)}.", skeleton.get_output_embeddings()
    others = {path for path in linear_paths(skeleton) if sees_images(skeleton.config)
              and (not path.startswith(text) or path.startswith(_towers(skeleton)))
              and skeleton.get_submodule(path) is not head}  # fmt: skip
    for paths in owners.values():
        shared = [path for path in paths if path.startswith(tuple(f"{block}." for block in blocks))]
        fixed.update((path, _SHARED) for path in shared if len(shared) > 1)
    layers = tuple(
        replace(_shape(skeleton, path, owners, fixed.get(path, "")), nontext=path in others)
        for path in linear_paths(skeleton)
    )
    layers += tuple(layer for block in blocks for layer in _others(skeleton.get_submodule(block), block))
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


def _decoder_path(skeleton: PreTrainedModel) -> str:
    decoder = skeleton.get_decoder()
    return next(path for path, module in skeleton.named_modules() if module is decoder)


def _towers(skeleton: PreTrainedModel) -> tuple[str, ...]:
    """Where the models begin that lie inside the decoder of one that sees images, as in Phi-4-multimodal, unless it has
    no blocks but theirs."""
    if not sees_images(skeleton.config):
        return ()
    prefix = _decoder_path(skeleton)
    decoder = skeleton.get_submodule(prefix)
    inside = [path for path, module in decoder.named_modules(prefix=prefix) if isinstance(module, PreTrainedModel)]
    towers = tuple(f"{path}." for path in inside if path != prefix)
    return towers if any(not path.startswith(towers) for path in _lists(decoder, prefix)) else ()


def _lists(root: nn.Module, prefix: str) -> list[str]:
    """Paths of the outermost lists of blocks."""
    lists: list[str] = []
    for path, module in root.named_modules(prefix=prefix):
        nested = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not nested and any(_is_block(item) for item in module):
            lists.append(path)
    return lists


def _is_block(module: nn.Module) -> bool:
    paths = linear_paths(module)
    return bool(paths) and "" not in paths


def _others(block: nn.Module, prefix: str) -> Iterator[LayerShape]:
    """Matrices of modules that are no linear layers, such as JetMoe's lists of experts."""
    linear = frozenset(linear_paths(block))
    for path, module in block.named_modules(prefix=prefix):
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        known = isinstance(module, _NO_MATRIX) or path.removeprefix(f"{prefix}.") in linear
        if weight is not None and weight.ndim > 1 and not known:
            reason = f"{type(module).__name__} is no linear layer"
            rows, columns = weight.flatten(0, -2).shape
            yield LayerShape(path=path, out_features=rows, in_features=columns, linear=False, fixed=reason)


def _shape(skeleton: nn.Module, path: str, owners: Mapping[int, list[str]], fixed: str) -> LayerShape:
    layer = skeleton.get_submodule(path)
    weight = layer.get_parameter("weight")
    out_features, in_features = weight.shape if isinstance(layer, nn.Linear) else reversed(weight.shape)
    owner = owners[id(weight)][0]
    return LayerShape(
        path=path,
        out_features=out_features,
        in_features=in_features,
        tied_to=owner if owner != path else "",
        linear=isinstance(layer, nn.Linear),
        fixed=fixed,
    )
