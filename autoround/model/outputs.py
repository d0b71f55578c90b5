"""What follows the last block, up to the logits; it works on single tokens.

Legend: C tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autoround.model.blocks import embedding, find_blocks
from autoround.model.carry import strip
from autoround.model.load import OpenModel
from autoround.model.record import RecordingModel

# Logits of one model that are in memory at a time, and the fewest tokens; a chunk needs a handful of such tensors.
# The heap keeps them; larger ones are mapped anew each time.
CHUNK_LOGITS, CHUNK_TOKENS = 2**21, 40


class Outputs(RecordingModel):
    """A model from the outputs of its last block to its logits, token by token.

    Args:
        model: an opened model; it is not changed.
        device: where it runs.
        dtype: floating-point dtype in which it runs.
        items: how many items blocks return, of which the hidden states are the first; 0 for these alone.
    """

    def __init__(self, model: OpenModel, device: torch.device, dtype: torch.dtype, *, items: int) -> None:
        super().__init__(model, find_blocks(model.skeleton), device, dtype)
        columns = embedding(model.skeleton).in_features
        self._model.set_input_embeddings(_NoEmbedding(columns, device, dtype))  # whose weights are not needed
        self.set_items(items)
        self._last = model.skeleton.get_submodule(self._blocks[-1])
        self._hidden_C1D = torch.empty(0)
        self._recorders[-1].is_last = False
        self._recorders[-1].register_forward_hook(self._replace)

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Logits (C, V) of single tokens, from the last block's outputs, in which they are differentiable."""
        self._seen.clear()
        self._hidden_C1D = strip(self._last, hidden_CD[:, None]).to(self._device)
        tokens_C1 = torch.zeros(len(hidden_CD), 1, dtype=torch.int64, device=self._device)
        logits_C1V: Tensor = self._model(input_ids=tokens_C1, use_cache=False).logits
        return logits_C1V[:, 0]

    def log_probabilities(self, hidden_CD: Tensor) -> Tensor:
        """Those of the next token (C, V), float32, differentiable as the logits are."""
        return self.logits(hidden_CD).float().log_softmax(-1)

    def _replace(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The outputs of the last block in place of its inputs."""
        del module, args
        return self._hidden_C1D if isinstance(output, Tensor) else (self._hidden_C1D, *output[1:])


def count_items(block: nn.Module, items: list[int]) -> RemovableHandle:
    """Until it is removed, add how many items each call of a block returns to a list; 0 for the hidden states alone."""
    return block.register_forward_hook(
        lambda module, args, output: items.append(0 if isinstance(output, Tensor) else len(output))
    )


def chunk_tokens(model: OpenModel) -> int:
    """Of how many tokens the logits should be in memory at a time."""
    return max(CHUNK_TOKENS, CHUNK_LOGITS // model.config.get_text_config().vocab_size)


class _NoEmbedding(nn.Module):
    """Stands in for the embedding where its outputs do not matter."""

    def __init__(self, columns: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._columns, self._device, self._dtype = columns, device, dtype

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return torch.zeros(*tokens_BT.shape, self._columns, dtype=self._dtype, device=self._device)
