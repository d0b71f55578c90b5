"""Reading the tensors of one block, and for accelerators those of the next one ahead."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autoround.beside import beside
from autoround.func.block import lay_out
from autoround.model.load import OpenModel
from autoround.precision import held_dtypes


def read_block(
    model: OpenModel, path: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Read every parameter and buffer of a block.

    Args:
        model: where from.
        path: the block's module path.
        dtype: of floating-point parameters and persistent buffers, but for those that transformers keeps in float32;
            as stored when None.
        device: where to.

    Returns:
        Name relative to the block -> tensor; linear weights as (O, I), those of experts as (E * O, I).

    Raises:
        ModelError: a tensor is missing.
    """
    block, stored = model.skeleton.get_submodule(path), frozenset(model.source.names())
    dtypes = None if dtype is None else held_dtypes(model.skeleton, dtype)
    tensors = {}
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        full = f"{path}.{name}"
        if tensor.is_meta or full in stored:
            tensor = model.source.read(full)
            tensor = tensor.to(dtypes(full)) if dtypes is not None and tensor.is_floating_point() else tensor
        tensors[name] = tensor
    return {name: tensor.to(device) for name, tensor in lay_out(block, tensors).items()}


class BlockReader:
    """Reads blocks to the host. Those for an accelerator come one ahead: while one is tuned there, the next is read.

    Args:
        model: where from.
        paths: of all blocks, in the order in which they are asked for; again and others in between is allowed.
        ahead: whether to hold a second block.
    """

    def __init__(self, model: OpenModel, paths: Sequence[str], *, ahead: bool) -> None:
        self._model = model
        self._following = dict(zip(paths, paths[1:], strict=False)) if ahead else {}
        self._coming: tuple[str, Callable[[], dict[str, Tensor]]] | None = None

    def read(self, path: str) -> dict[str, Tensor]:
        """See ``read_block``; errors of a block are raised when it is asked for."""
        if self._coming is not None and self._coming[0] == path:
            wait, self._coming = self._coming[1], None
            tensors = wait()
        else:
            tensors = read_block(self._model, path)
        following = self._following.get(path)
        if following is not None and self._coming is None:
            self._coming = following, beside(lambda: self._copied(following))
        return tensors

    def _copied(self, path: str) -> dict[str, Tensor]:
        """In memory of its own: what is mapped is read from the disk here."""
        return {name: tensor.clone() for name, tensor in read_block(self._model, path).items()}
