"""Tiny random models of the architectures that GGUF files know, written as float GGUF files."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from autoround.formats.gguf.architectures import stored_float, tensor_names
from autoround.formats.gguf.container import GgufTensor, Value, quantization_metadata, write_gguf
from autoround.formats.gguf.metadata import extra_tensors, metadata

VOCABULARY = 48
_ALL_F32, _MOSTLY_F16 = 0, 1

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": False}  # fmt: skip
_SPARSE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}

# Name -> model type and settings. Some are transformers' defaults because its reader of GGUF files knows no others.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_wide_heads": ("llama", {"head_dim": 16}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama_3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 5e2,
            }  # fmt: skip
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "use_sliding_window": False}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3_yarn": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e4,
            }  # fmt: skip
        },
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 6, "tie_word_embeddings": True},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 6,
            "num_hidden_layers": 7,
            "tie_word_embeddings": True,
        },  # fmt: skip
    ),
    "phi3": ("phi3", {}),
    "phi3_long": (
        "phi3",
        {
            "original_max_position_embeddings": 512,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 1.5, 2.5, 3.5],
            },  # fmt: skip
        },
    ),
    "phi3_partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2_moe": (
        "qwen2_moe",
        _SPARSE | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    ),
    "qwen3_moe": ("qwen3_moe", _SPARSE | {"head_dim": 16, "moe_intermediate_size": 768, "norm_topk_prob": True}),
}


def make(name: str, **settings: Any) -> PreTrainedModel:
    """A model with random weights, biases and norms included."""
    model_type, own = MODELS[name]
    config = CONFIG_MAPPING[model_type](**_BASE | own | settings)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + torch.randn_like(parameter) * 0.1)
    return model


def vocabulary() -> dict[str, Value]:
    """A tokenizer section as small as llama.cpp takes it."""
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", *(f"▁{number}" for number in range(VOCABULARY - 4))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(number) for number in range(VOCABULARY)],
        "tokenizer.ggml.token_type": [2, 3, 3, 6] + [1] * (VOCABULARY - 4),
        "tokenizer.ggml.add_bos_token": False,
    }


def tensors(model: PreTrainedModel, matrices: torch.dtype = torch.float32) -> list[GgufTensor]:
    """All tensors of a model; matrices in a dtype, vectors in float32."""
    types = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
    found = dict(extra_tensors(model.config))
    for name, parameter in model.named_parameters():
        found |= zip(
            tensor_names(model.config, name), stored_float(model.config, name, parameter.detach()), strict=True
        )
    cast = {
        name: tensor if tensor.ndim == 1 or "_inp." in name else tensor.to(matrices) for name, tensor in found.items()
    }
    return [
        GgufTensor(name, tuple(t.shape), types[t.dtype], partial(torch.split, t, len(t))) for name, t in cast.items()
    ]


def write_model(model: PreTrainedModel, file: Path, matrices: torch.dtype = torch.float32) -> None:
    """Write a model as a GGUF file that llama.cpp and transformers load."""
    file_type = _ALL_F32 if matrices == torch.float32 else _MOSTLY_F16
    values = metadata(model.config, "tiny") | vocabulary() | quantization_metadata(file_type)
    write_gguf(file, values, tensors(model, matrices))
