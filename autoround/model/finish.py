"""What lies between the last block and the output head, and the weights of layers outside the blocks.

Legend: O output features, I input features, N samples, B samples in a batch, T tokens, D hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from autoround.model.carry import strip
from autoround.model.load import OpenModel
from autoround.model.media import NO_MEDIA, Media
from autoround.model.record import RecordingModel


def head_path(skeleton: PreTrainedModel) -> str:
    """Path of the output head; empty where there is none, or one that is no linear layer."""
    head = skeleton.get_output_embeddings()
    return next((path for path, each in skeleton.named_modules() if each is head and isinstance(each, nn.Linear)), "")


def read_weight(model: OpenModel, path: str, *, device: torch.device | str = "cpu") -> Tensor:
    """The weight of a linear layer or an embedding, (O, I), as it is stored.

    Raises:
        ModelError: it is missing.
    """
    weight = model.source.read(f"{path}.weight")
    return (weight.mT if isinstance(model.skeleton.get_submodule(path), Conv1D) else weight).to(device)


def mean_square(inputs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean square of every channel over the valid tokens, float32 (D,).

    >>> mean_square([(torch.tensor([[[1.0, 3.0], [9.0, 9.0]]]), torch.tensor([[True, False]]))]).tolist()
    [1.0, 9.0]
    """
    sums, counts = [], []
    for x_BTD, valid_BT in inputs:
        sums.append(x_BTD[valid_BT].float().square().sum(0))
        counts.append(valid_BT.sum())
    return torch.stack(sums).sum(0) / torch.stack(counts).sum()


class Ending(RecordingModel):
    """A model whose last block returns what it is told, run up to the output head.

    Args:
        model: an opened model; it is not changed.
        blocks: paths of all blocks in call order.
        head: path of the output head.
        device: where it runs.
        dtype: floating-point dtype in which it runs.
    """

    def __init__(
        self, model: OpenModel, blocks: Sequence[str], head: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(model, [*blocks, head], device, dtype)
        self._inside = RecordingModel(model, blocks, device, dtype)
        self._last = model.skeleton.get_submodule(blocks[-1])
        self._hidden_BTD = torch.empty(0)
        self._recorders[-2].register_forward_hook(self._replace)

    def head_inputs(
        self, hidden_NTD: Tensor, tokens_NT: Tensor, valid_NT: Tensor, *, batch_size: int, media: Media = NO_MEDIA
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What the head is called with, batch by batch.

        Args:
            hidden_NTD: outputs of the last block.
            tokens_NT: int64, the token ids that they belong to.
            valid_NT: bool, False for padding tokens.
            batch_size: rows in a forward; it need not divide N.
            media: what the rows have beside tokens.

        Returns:
            (input_BTD, valid_BT) pairs.

        Raises:
            ModelError: the model does not call its head once, after the blocks and with hidden states.
        """
        padded, first = not bool(valid_NT.all()), torch.zeros(1, dtype=torch.int64)
        self._inside(tokens_NT[first], None, shift=0.0, media=media.take(first))  # finds out what blocks return
        self.set_items(self._inside.items)
        for rows_B in torch.arange(len(tokens_NT)).split(batch_size):
            self._hidden_BTD, valid_BT = (
                strip(self._last, hidden_NTD[rows_B]).to(self._device),
                valid_NT[rows_B].to(self._device),
            )
            calls = self(tokens_NT[rows_B], valid_BT if padded else None, shift=0.0, media=media.take(rows_B))
            yield calls[-1].hidden, valid_BT

    def _replace(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The outputs of the last block in place of its inputs."""
        del module, args
        return self._hidden_BTD if isinstance(output, Tensor) else (self._hidden_BTD, *output[1:])
