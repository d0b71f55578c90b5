"""Tiny mixtures of experts, and what codes make of them."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from autoround import func
from autoround.engine import Run
from autoround.func.block import transposed_weights
from autoround.journal import Journal
from tests.engine.small import VOCABULARY

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2, "tie_word_embeddings": False}  # fmt: skip
_CHOSEN: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_LATENT: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "num_key_value_heads": 4, "n_shared_experts": 1}  # fmt: skip

# Models whose checkpoints name every expert.
APART: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": _CHOSEN | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3_moe": _CHOSEN | {"moe_intermediate_size": 32},
    "olmoe": _CHOSEN,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
}
# One whose checkpoints hold stacks, inputs first, and biases.
STACKED = "gpt_oss"
MODELS = APART | {STACKED: {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}}


def make(name: str, **settings: Any) -> PreTrainedModel:
    """A model with random weights, biases included."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**_BASE | MODELS[name] | settings)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def replaced(model: PreTrainedModel, run: Run) -> PreTrainedModel:
    """The model with the dequantized codes of a run as weights."""
    journal, parameters = Journal(run.journal_folder, {}), dict(model.named_parameters())
    turned = transposed_weights(run.model.skeleton)
    with torch.no_grad():
        for index, part in enumerate(run.plan.parts):
            for relative, own in journal.read_block(index).items():
                path = f"{part.prefix}{relative}"
                weight = parameters[run.plan.layers[path].shape.parameter]
                weight = weight.mT if f"{path}.weight" in turned else weight
                weight.copy_(func.dequantize(own, part.specs[relative]).view(weight.shape))
    return model
