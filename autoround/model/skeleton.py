"""Models without weights: transformers' own modules with every parameter on the meta device."""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from autoround.errors import ModelError
from autoround.model.oddities import mark_experts


def auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """The class of transformers that builds a model: of images and text where the configuration is of such a model,
    unless it names the language model alone.

    >>> from transformers import LlamaConfig, LlavaConfig
    >>> auto_class(LlamaConfig()).__name__, auto_class(LlavaConfig()).__name__
    ('AutoModelForCausalLM', 'AutoModelForImageTextToText')
    """
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    text_only = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    both = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    named = text_only is not both and text_only is not None and text_only.__name__ in (config.architectures or ())
    return AutoModelForCausalLM if named else AutoModelForImageTextToText


def sees_images(config: PreTrainedConfig) -> bool:
    """Whether a model takes images beside text.

    >>> from transformers import LlamaConfig, LlavaConfig, Phi4MultimodalConfig
    >>> sees_images(LlamaConfig()), sees_images(LlavaConfig()), sees_images(Phi4MultimodalConfig())
    (False, True, True)
    """
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return auto_class(config) is AutoModelForImageTextToText
    kind = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)
    return kind is not None and "image" in kind.input_modalities


def build_skeleton(config: PreTrainedConfig, where: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a language model, or one of images and text, from its configuration, in eval mode.

    Args:
        config: is not changed.
        where: what the configuration comes from, for messages.
        trust_remote_code: run the model's own Python code where the configuration names some.

    Returns:
        The model; parameters are float32 on the meta device, buffers hold their initial values.

    Raises:
        ModelError: not an architecture of such a model, or one that cannot be built.
    """
    kind = auto_class(config)
    custom = trust_remote_code and kind.__name__ in config.to_dict().get("auto_map", {})
    known = kind is AutoModelForImageTextToText or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not (known or custom) or config.is_encoder_decoder:
        raise ModelError(
            f"{where}: found model type {config.model_type}; needed a decoder-only language model "
            "(AutoModelForCausalLM) or one of images and text (AutoModelForImageTextToText); other architectures are "
            "not supported yet"
        )
    try:
        skeleton = _built(kind, config, nowhere=True, trust_remote_code=trust_remote_code)
        if any(buffer.is_meta for buffer in skeleton.buffers()):
            skeleton = _built(kind, config, nowhere=False, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError, OSError) as error:
        raise ModelError(f"{where}: found a {config.model_type} configuration that cannot be built: {error}") from error
    skeleton.tie_weights()
    mark_experts(skeleton)
    return skeleton.requires_grad_(False).eval()


def _built(kind: Any, config: PreTrainedConfig, *, nowhere: bool, trust_remote_code: bool) -> PreTrainedModel:
    """A model as its classes make it; ``nowhere``: what they leave empty takes no memory, not even for a moment.

    Moments of a gigabyte, with small things between them, leave a heap of that size behind.
    """
    with init_empty_weights(include_buffers=False), _Nowhere() if nowhere else nullcontext():
        model: PreTrainedModel = kind.from_config(
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    return model


class _Nowhere(TorchFunctionMode):
    """Makes empty tensors on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        found = kwargs or {}
        return func(*args, **({**found, "device": "meta"} if func is torch.empty else found))


def copy_skeleton(module: PreTrainedModel) -> PreTrainedModel:
    """The same for a model in memory, which is not changed; buffers are copied to the CPU."""
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for parameter in module.parameters()
    }
    memo.update({id(buffer): buffer.detach().clone().cpu() for buffer in module.buffers()})
    skeleton = copy.deepcopy(module, memo).eval()
    mark_experts(skeleton)
    return skeleton
