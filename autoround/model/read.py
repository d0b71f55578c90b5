"""Reading the tensors of one block."""

import torch
from torch import Tensor

from autoround.func.block import lay_out
from autoround.model.load import OpenModel


def read_block(
    model: OpenModel, path: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Read every parameter and buffer of a block.

    Args:
        model: where from.
        path: the block's module path.
        dtype: of floating-point parameters and persistent buffers; as stored when None.
        device: where to.

    Returns:
        Name relative to the block -> tensor; linear weights as (O, I), those of experts as (E * O, I).

    Raises:
        ModelError: a tensor is missing.
    """
    block, stored = model.skeleton.get_submodule(path), frozenset(model.source.names())
    tensors = {}
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        full = f"{path}.{name}"
        if tensor.is_meta or full in stored:
            tensor = model.source.read(full)
            tensor = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        tensors[name] = tensor
    return {name: tensor.to(device) for name, tensor in lay_out(block, tensors).items()}
