"""What llama.cpp has to know of a model: hyperparameters as metadata, and rotary factors as tensors.

H half of a head.
"""

import math
from typing import Any

import torch
from torch import Tensor

from autoround.formats.gguf.architectures import architecture, check, head_dim, rope_parameters
from autoround.formats.gguf.container import Value
from autoround.log import LOGGER


def metadata(config: Any, name: str) -> dict[str, Value]:
    """Everything but the tokenizer and what says how the file is quantized.

    Args:
        config: of the model.
        name: of the model, for people.

    Raises:
        UsageError: an unknown architecture, or a setting that llama.cpp cannot be told.
    """
    check(config)
    arch = architecture(config.model_type)
    window = getattr(config, "sliding_window", None)
    if window and not arch.window_period and window < config.max_position_embeddings:
        LOGGER.warning(
            "%s: llama.cpp has no sliding window for it; contexts beyond %d tokens differ from transformers",
            config.model_type, window)  # fmt: skip
    values = _sizes(config) | _attention(config) | _experts(config) | _rope(config)
    general: dict[str, Value] = {"general.architecture": arch.name, "general.type": "model", "general.name": name}
    return general | {f"{arch.name}.{key}": value for key, value in values.items()}


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """Tensors of the file that no module holds: by what the wavelengths of the rotary positions are stretched.

    Returns:
        Name in the file -> float32 (H,).
    """
    parameters = rope_parameters(config)["full_attention"]
    if parameters["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(parameters, head_dim(config))}
    if parameters["rope_type"] == "longrope":
        return {
            f"rope_factors_{kind}.weight": torch.tensor(parameters[f"{kind}_factor"], dtype=torch.float32)
            for kind in ("long", "short")
        }
    return {}


def _llama3_factors(parameters: dict[str, Any], size: int) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones are not, those between by degrees."""
    steps_H = torch.arange(0, size, 2, dtype=torch.float64) / size
    turns_H = parameters["original_max_position_embeddings"] / (2 * math.pi * parameters["rope_theta"] ** steps_H)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    kept_H = ((turns_H - low) / (high - low)).clamp(0, 1)
    factor_H: Tensor = 1 / (kept_H + (1 - kept_H) / parameters["factor"])
    return factor_H.float()


def _sizes(config: Any) -> dict[str, Value]:
    return {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
    }


def _attention(config: Any) -> dict[str, Value]:
    values: dict[str, Value] = {
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    if architecture(config.model_type).window_period or config.model_type == "phi3":
        values["attention.sliding_window"] = config.sliding_window or 0
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := getattr(config, key, None)) is not None:
            values[key] = float(cap)
    return values


def _experts(config: Any) -> dict[str, Value]:
    keys = {
        "expert_count": ("num_local_experts", "num_experts"),
        "expert_used_count": ("num_experts_per_tok",),
        "expert_feed_forward_length": ("moe_intermediate_size",),
        "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    }
    settings = config.to_dict()
    return {key: settings[name] for key, names in keys.items() for name in names if name in settings}


def _rope(config: Any) -> dict[str, Value]:
    kinds = rope_parameters(config)
    parameters = kinds["full_attention"]
    values: dict[str, Value] = {
        "rope.dimension_count": int(head_dim(config) * parameters.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(parameters["rope_theta"]),
    }
    if sliding := kinds.get("sliding_attention"):
        values["rope.freq_base_swa"] = float(sliding["rope_theta"])
    return values | _rope_scaling(config, parameters)


def _rope_scaling(config: Any, parameters: dict[str, Any]) -> dict[str, Value]:
    original = parameters.get("original_max_position_embeddings", config.max_position_embeddings)
    if parameters["rope_type"] == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}
    if parameters["rope_type"] == "yarn":
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(parameters.get("factor") or config.max_position_embeddings / original),
            "rope.scaling.original_context_length": original,
            "rope.scaling.yarn_beta_fast": float(parameters.get("beta_fast") or 32),
            "rope.scaling.yarn_beta_slow": float(parameters.get("beta_slow") or 1),
        }
    if parameters["rope_type"] == "longrope":
        stretch = config.max_position_embeddings / original
        growth = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        return {
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": float(parameters.get("attention_factor") or growth),
        }
    return {}
