"""Models without weights: transformers' own modules with every parameter on the meta device."""

import copy

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from autoround.errors import ModelError


def build_skeleton(config: PreTrainedConfig, where: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a causal language model from its configuration, in eval mode.

    Args:
        config: is not changed.
        where: what the configuration comes from, for messages.
        trust_remote_code: run the model's own Python code where the configuration names some.

    Returns:
        The model; parameters are float32 on the meta device, buffers hold their initial values.

    Raises:
        ModelError: not an architecture of a causal language model, or one that cannot be built.
    """
    custom = trust_remote_code and AutoModelForCausalLM.__name__ in config.to_dict().get("auto_map", {})
    if (type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not custom) or config.is_encoder_decoder:
        raise ModelError(
            f"{where}: found model type {config.model_type}; needed a decoder-only language model "
            "(AutoModelForCausalLM); other architectures are not supported yet"
        )
    try:
        with init_empty_weights(include_buffers=False):
            skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except (ValueError, ImportError, OSError) as error:
        raise ModelError(f"{where}: found a {config.model_type} configuration that cannot be built: {error}") from error
    skeleton.tie_weights()
    return skeleton.requires_grad_(False).eval()


def copy_skeleton(module: PreTrainedModel) -> PreTrainedModel:
    """The same for a model in memory, which is not changed; buffers are copied to the CPU."""
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for parameter in module.parameters()
    }
    memo.update({id(buffer): buffer.detach().clone().cpu() for buffer in module.buffers()})
    return copy.deepcopy(module, memo).eval()
