"""Tiny configurations of the real classes: one row per model type, with what is special about it.

A row that cannot work holds the words with which the engine says so.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from autoround.model.skeleton import auto_class
from tests.families.vision import VISION, Vision

VOCABULARY, ROWS, TOKENS = 96, 4, 16

_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
_STACK: dict[str, Any] = _IDS | {"hidden_size": 64, "num_hidden_layers": 2}
_PLAIN: dict[str, Any] = _STACK | {"intermediate_size": 96, "num_attention_heads": 4}
_MODERN: dict[str, Any] = _PLAIN | _HEADS
_WIDE: dict[str, Any] = _MODERN | {"head_dim": 16}
_OLD: dict[str, Any] = _IDS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_LOCAL: dict[str, Any] = {
    "num_hidden_layers": 3,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MAMBA2: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}
_MAMBA: dict[str, Any] = {"mamba_d_state": 8, "mamba_dt_rank": 32, "use_mamba_kernels": False}
_DELTA: dict[str, Any] = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_MERGED = "which the model merges or splits into"


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model type under test.

    Attributes:
        settings: of its configuration.
        kind: "dense", "hybrid", "experts" or "vision".
        special: what sets it apart from Llama, for the page.
        refused: a pattern of the engine's words where it cannot work.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    kind: str = "dense"
    special: str = ""
    refused: str = ""


def _dense(settings: dict[str, Any], special: str = "", *, refused: str = "") -> Family:
    return Family(settings=settings, special=special, refused=refused)


def _hybrid(settings: dict[str, Any], special: str, *, refused: str = "") -> Family:
    return Family(settings=settings, kind="hybrid", special=special, refused=refused)


def _experts(settings: dict[str, Any], special: str = "", *, refused: str = "") -> Family:
    return Family(settings=settings, kind="experts", special=special, refused=refused)


def _seeing(each: Vision) -> dict[str, Any]:
    text = _MODERN | each.text if each.flat else {"text_config": _WIDE | each.text}
    return {**text, "vision_config": each.eye, **each.others}


FAMILIES: dict[str, Family] = {
    "llama": _dense(_MODERN),
    "mistral": _dense(_WIDE | {"sliding_window": 4}, "sliding attention"),
    "ministral": _dense(_WIDE | _LOCAL, "sliding and full attention"),
    "ministral3": _dense(_WIDE),
    "qwen2": _dense(_MODERN, "biases on q, k, v"),
    "qwen3": _dense(_WIDE, "norms of queries and keys"),
    "gemma": _dense(_WIDE, "tied head"),
    "gemma2": _dense(_WIDE | _LOCAL, "sliding and full attention, caps of logits"),
    "gemma3_text": _dense(_WIDE | _LOCAL, "sliding and full attention with own rotary tables"),
    "phi": _dense(_MODERN | {"partial_rotary_factor": 0.5}, "parallel attention and MLP, biases, biased head"),
    "phi3": _dense(_MODERN, "fused qkv and gate_up"),
    "gpt2": _dense(_OLD, "Conv1D, fused qkv"),
    "gpt_bigcode": _dense(_OLD, "one key head, fused qkv"),
    "gpt_neo": _dense(
        _IDS
        | {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 4}
        | {"attention_types": [[["global", "local"], 1]]},
        "local attention in every other block",
    ),
    "gpt_neox": _dense(_PLAIN, "parallel blocks, fused qkv"),
    "gpt_neox_japanese": _dense(_STACK | {"num_attention_heads": 4}, "a bias in the last block alone"),
    "gptj": _dense(_OLD | {"rotary_dim": 8}, "parallel blocks"),
    "codegen": _dense(_OLD | {"rotary_dim": 8}, "parallel blocks, fused qkv"),
    "opt": _dense(_STACK | {"ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": 64}, "learned positions"),
    "bloom": _dense(_IDS | {"hidden_size": 64, "n_layer": 2, "n_head": 4}, "ALiBi, tuples, fused qkv"),
    "falcon": _dense(_STACK | {"num_attention_heads": 4}, "parallel blocks, one key head"),
    "mpt": _dense(_IDS | {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, "ALiBi, fused qkv"),
    "starcoder2": _dense(_MODERN, "biases"),
    "stablelm": _dense(_MODERN | {"use_qkv_bias": True}, "layer norms"),
    "cohere": _dense(_MODERN, "parallel blocks"),
    "cohere2": _dense(_MODERN | _LOCAL, "parallel blocks, sliding attention with rotary tables, full without"),
    "olmo": _dense(_MODERN, "norms without weights"),
    "olmo2": _dense(_MODERN, "norms after the layers"),
    "olmo3": _dense(_MODERN | _LOCAL, "sliding and full attention"),
    "granite": _dense(_MODERN, "multipliers"),
    "granite_swa": _dense(_MODERN | _LOCAL, "sliding and full attention"),
    "glm": _dense(_WIDE, "fused gate_up"),
    "glm4": _dense(_WIDE, "fused gate_up, four norms"),
    "smollm3": _dense(_MODERN | {"no_rope_layers": [1, 0]}, "no rotary table in some blocks"),
    "ernie4_5": _dense(_WIDE),
    "exaone4": _dense(_MODERN | _LOCAL, "sliding and full attention"),
    "nemotron": _dense(_MODERN, "squared ReLU"),
    "persimmon": _dense(_PLAIN, "fused qkv, norms of queries and keys"),
    "arcee": _dense(_MODERN, "no gate"),
    "apertus": _dense(_MODERN, "an activation with parameters"),
    "helium": _dense(_WIDE),
    "seed_oss": _dense(_WIDE, "biases on q, k, v"),
    "cwm": _dense(_WIDE | _LOCAL, "sliding and full attention"),
    "hunyuan_v1_dense": _dense(_WIDE),
    "internlm3": _dense(_WIDE),
    "minicpm3": _dense(_PLAIN | _LATENT, "latent attention"),
    "youtu": _dense(_PLAIN | _LATENT, "latent attention"),
    "jais2": _dense(_MODERN, "biases"),
    "iquestcoder": _dense(_WIDE),
    "hyperclovax": _dense(_MODERN),
    "nanochat": _dense(_MODERN, "norms without weights"),
    "vaultgemma": _dense(_WIDE | _LOCAL, "sliding and full attention"),
    "diffllama": _dense(_MODERN, "differential attention: blocks differ by depth"),
    "doge": _dense(_MODERN, "dynamic masks"),
    "bitnet": _dense(_MODERN, "norms inside attention and MLP"),
    "biogpt": _dense(_PLAIN, "learned positions"),
    "xglm": _dense(_IDS | {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}, "computed positions"),
    "modernbert-decoder": _dense(
        _PLAIN | {"layer_types": ["sliding_attention", "full_attention"], "local_attention": 8}, "fused qkv"
    ),
    "ctrl": _dense(_IDS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "dff": 96, "n_positions": 64}, "tuples"),
    "openai-gpt": _dense(_OLD, "Conv1D, no cache"),
    "hrm_text": _dense(_WIDE, "blocks that run several times", refused=_MERGED),
    "gemma3n_text": _dense(
        _WIDE
        | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 32}
        | {"vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 32, "sliding_window": 4}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4},
        "keys and values shared across blocks, inputs per layer, four streams",
    ),
    "gemma4_text": _dense(
        _WIDE
        | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 32, "global_head_dim": 32}
        | {"vocab_size_per_layer_input": VOCABULARY, "sliding_window": 4}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        "keys and values shared across blocks, inputs per layer",
    ),
    "qwen3_5_text": _hybrid(_WIDE | _DELTA, "gated delta rule and attention"),
    "qwen3_next": _hybrid(
        _WIDE | _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 32, "mlp_only_layers": [0]},
        "gated delta rule and attention, experts",
    ),
    "olmo_hybrid": _hybrid(_MODERN | _DELTA, "gated delta rule and attention", refused=_MERGED),
    "falcon_h1": _hybrid(_WIDE | _MAMBA2 | {"mamba_d_ssm": 128}, "mamba 2 and attention in parallel"),
    "bamba": _hybrid(_MODERN | _MAMBA2 | {"num_hidden_layers": 3, "attn_layer_indices": [1]}, "mamba 2 and attention"),
    "granitemoehybrid": _hybrid(
        _MODERN
        | _MAMBA2
        | _LOCAL_EXPERTS
        | {"shared_intermediate_size": 96, "layer_types": ["linear_attention", "full_attention"]},
        "mamba 2 and attention, experts",
    ),
    "jamba": _hybrid(
        _MODERN | _MAMBA | {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
        "mamba and attention, experts",
    ),
    "nemotron_h": _hybrid(
        _WIDE
        | {"ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 8}
        | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"], "use_mamba_kernels": False}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"moe_shared_expert_intermediate_size": 32},
        "blocks of mamba 2, attention, MLP or experts alone",
    ),
    "lfm2": _hybrid(
        _MODERN | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        "short convolutions and attention",
    ),
    "lfm3": _hybrid(
        _WIDE | {"layer_types": ["conv", "full_attention"], "sliding_window": 4}, "short convolutions and attention"
    ),
    "mamba": _hybrid(_STACK | {"state_size": 8, "time_step_rank": 32}, "mamba alone"),
    "falcon_mamba": _hybrid(_STACK | {"state_size": 8, "time_step_rank": 32}, "mamba alone"),
    "mamba2": _hybrid(
        _STACK | {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8}, "mamba 2 alone"
    ),
    "recurrent_gemma": _hybrid(
        _MODERN | {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 8},
        "linear recurrences and local attention",
    ),
    "zamba": _hybrid(
        _MODERN | _MAMBA | {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
        "mamba, one attention block shared by several places",
    ),
    "zamba2": _hybrid(
        _MODERN
        | {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
        | {"mamba_d_state": 16, "n_mamba_heads": 8, "mamba_headdim": 16, "chunk_size": 8, "use_mamba_kernels": False},
        "mamba 2, one attention block shared by several places",
    ),
    "rwkv": _hybrid(_STACK | {"attention_hidden_size": 64, "intermediate_size": 96}, "linear recurrences"),
    "xlstm": _hybrid(_STACK | {"num_heads": 4, "qk_dim_factor": 1.0, "chunk_size": 8}, "matrix memories"),
    "mixtral": _experts(_MODERN | _LOCAL_EXPERTS),
    "qwen2_moe": _experts(_MODERN | _EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3_moe": _experts(_WIDE | _EXPERTS),
    "olmoe": _experts(_MODERN | {"num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": _experts(_MODERN | _LOCAL_EXPERTS, "ParallelExperts"),
    "deepseek_v3": _experts(_PLAIN | _LATENT | _ROUTED | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    "glm4_moe": _experts(_WIDE | _ROUTED | {"first_k_dense_replace": 1}),
    "gpt_oss": _experts(_WIDE | _LOCAL_EXPERTS | {"layer_types": ["sliding_attention", "full_attention"]}, "sinks"),
    "ernie4_5_moe": _experts(_WIDE | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}),
    "phimoe": _experts(_MODERN | _LOCAL_EXPERTS),
    "granitemoeshared": _experts(_MODERN | _LOCAL_EXPERTS | {"shared_intermediate_size": 32}, "shared experts"),
    "deepseek_v2": _experts(
        _PLAIN | _LATENT | _ROUTED | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}, "latent attention"
    ),
    "dots1": _experts(
        _MODERN | _ROUTED | {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    ),
    "hunyuan_v1_moe": _experts(_WIDE | {"num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 32}),
    "flex_olmo": _experts(_MODERN | {"num_experts": 4, "num_experts_per_tok": 2}),
    "jetmoe": _experts(
        _STACK | _LOCAL_EXPERTS | {"kv_channels": 16, "num_key_value_heads": 2, "intermediate_size": 64}
    ),
    "lfm2_moe": _experts(
        _MODERN | _EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "num_hidden_layers": 2},
        "short convolutions and attention",
    ),
    "llama4_text": _experts(
        _WIDE | _LOCAL_EXPERTS | {"intermediate_size_mlp": 96, "interleave_moe_layer_step": 1, "no_rope_layers": [1, 0]}
    ),
    "minimax": _experts(
        _WIDE | _LOCAL_EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
        "lightning attention and attention",
    ),
    "qwen3_5_moe_text": _experts(
        _WIDE | _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 32}, "gated delta rule and attention"
    ),
    "solar_open": _experts(_WIDE | _ROUTED | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    **{name: Family(settings=_seeing(each), kind="vision", special=each.special) for name, each in VISION.items()},
}


def make(model_type: str) -> PreTrainedModel:
    """A model with random weights, biases and norms included."""
    config: PreTrainedConfig = CONFIG_MAPPING[model_type](**FAMILIES[model_type].settings)
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0  # as loading some models leaves it
    return model
