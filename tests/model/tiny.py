"""Tiny random models of the real classes, and their blocks run one by one."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from autoround import func
from autoround.model.capture import Captured
from autoround.model.load import OpenModel
from autoround.model.media import NO_MEDIA, Media
from autoround.model.read import read_block

VOCABULARY, TOKENS, ROWS = 48, 12, 5

_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
_MODERN: dict[str, Any] = _IDS | {
    "pad_token_id": 0,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_MODERN, tie_word_embeddings=False),
    "llama_tied": LlamaConfig(**_MODERN, tie_word_embeddings=True),
    "llama_biased": LlamaConfig(**_MODERN, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**_MODERN),
    "qwen3": Qwen3Config(**_MODERN, head_dim=16),
    "gemma3": Gemma3TextConfig(
        **_MODERN,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": GPT2Config(**_IDS, n_embd=32, n_layer=2, n_head=4, n_positions=32),
    # Blocks that return tuples; keys biased by position, with batch and heads in one axis.
    "bloom": BloomConfig(**_IDS, hidden_size=32, n_layer=2, n_head=4),
    # Local and global attention alternate.
    "gpt_neo": GPTNeoConfig(
        **_IDS, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4
    ),
}


def make(name: str, **settings: Any) -> PreTrainedModel:
    """A model with random weights, biases and norms included."""
    config = CONFIGS[name].from_dict(CONFIGS[name].to_dict() | settings)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def save(name: str, folder: Path, **settings: Any) -> PreTrainedModel:
    """The same, also written to a folder."""
    model = make(name)
    model.save_pretrained(folder, **settings)
    return model


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))


def validity(*, padded: bool) -> Tensor:
    """One row ends in padding and one begins with it, or there is none."""
    valid_NT = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    if padded:
        valid_NT[1, 8:] = valid_NT[3, :5] = False
    return valid_NT


def block_outputs(
    model: nn.Module, blocks: Iterable[str], tokens_NT: Tensor, valid_NT: Tensor, media: Media = NO_MEDIA
) -> list[Tensor]:
    """What the blocks of a loaded model return in one forward of all rows."""
    outputs: list[Tensor] = []

    def note(module: nn.Module, args: object, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    hooks = [model.get_submodule(path).register_forward_hook(note) for path in blocks]
    with torch.no_grad():
        own = media.take(torch.arange(len(tokens_NT)))
        model(input_ids=tokens_NT, attention_mask=None if valid_NT.all() else valid_NT.long(), **own)
    for hook in hooks:
        hook.remove()
    return outputs


def chained_outputs(model: OpenModel, blocks: Iterable[str], captured: Captured, batch_size: int) -> list[Tensor]:
    """What the lifted blocks return, each fed the outputs of the one before it."""
    hidden_NTD, outputs = captured.hidden_NTD, []
    for path, template in zip(blocks, captured.templates, strict=True):
        block_fn = func.make_block_fn(model.skeleton.get_submodule(path))
        tensors = read_block(model, path)
        with torch.no_grad():
            parts = [
                block_fn(tensors, template.bind(hidden_NTD[rows_B], rows_B))
                for rows_B in torch.arange(len(hidden_NTD)).split(batch_size)
            ]
        hidden_NTD = torch.cat(parts)
        outputs.append(hidden_NTD)
    return outputs
