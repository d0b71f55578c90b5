"""Modules without weights."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from autoround.model.skeleton import build_skeleton

CONFIG = LlamaConfig(hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=8)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made in memory."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not made.is_meta:
            self.found = max(self.found, made.untyped_storage().nbytes())
        return made


def test_weights_take_no_memory_while_modules_are_made() -> None:
    """Not even for a moment: what small things come to lie between would keep the heap from shrinking again."""
    with Largest() as largest:
        skeleton = build_skeleton(CONFIG, "here")
    assert largest.found < 256 * 256
    assert all(weight.is_meta for weight in skeleton.parameters())
    assert not any(buffer.is_meta for buffer in skeleton.buffers())
    assert torch.isfinite(skeleton.model.rotary_emb.inv_freq).all()
