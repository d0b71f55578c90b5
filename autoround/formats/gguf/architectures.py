"""How llama.cpp names and lays out the tensors of transformers models.

E experts, F their width, D hidden, O out, R rows of one half of a fused tensor.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import gguf
import torch
from torch import Tensor

from autoround.errors import UsageError

_INSTEAD = "use another format such as auto_round"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What is special about a transformers model type in GGUF files.

    Attributes:
        name: llama.cpp's name of it.
        permuted: rows of query and key weights are reordered: llama.cpp rotates neighbours, transformers halves.
        norm_offset: added to the weights of norms.
        rope_types: kinds of rotary position scaling that files can tell.
        window_period: every so many layers attention is full, in those between it slides; 0: it is full in all.
        wide_scale_layers: with so many layers attention is scaled by the hidden size per head, not by the head's size.
        full_rope_period: every so many layers there are no rotary positions; 0: all have them.
        fixed: configuration values that llama.cpp takes for granted, by name.
        needed: settings without which llama.cpp would take a value of its own.
    """

    name: str
    permuted: bool = False
    norm_offset: float = 0.0
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    window_period: int = 0
    wide_scale_layers: int = 0
    full_rope_period: int = 0
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    needed: tuple[str, ...] = ()


_Settings: TypeAlias = dict[str, tuple[Any, ...]]
_SILU: _Settings = {"hidden_act": ("silu",)}
_GELU: _Settings = {"hidden_activation": ("gelu_pytorch_tanh",)}
_PLAIN: _Settings = {"attention_bias": (False,)}
_SPARSE: _Settings = {"decoder_sparse_step": (1,), "mlp_only_layers": (None, [])}
_LLAMA = Architecture(name="llama", permuted=True, rope_types=("default", "linear", "yarn", "llama3"), fixed=_SILU)

ARCHITECTURES: Mapping[str, Architecture] = {
    "gemma2": Architecture(
        name="gemma2", norm_offset=1.0, rope_types=("default",), window_period=2, wide_scale_layers=46,
        fixed=_GELU | _PLAIN | {"tie_word_embeddings": (True,)},
        needed=("attn_logit_softcapping", "final_logit_softcapping")),
    "gemma3_text": Architecture(
        name="gemma3", norm_offset=1.0, rope_types=("default", "linear"), window_period=6, wide_scale_layers=62,
        fixed=_GELU | _PLAIN | {"attn_logit_softcapping": (None,), "use_bidirectional_attention": (None, False)}),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "phi3": Architecture(name="phi3", rope_types=("default", "longrope"), fixed=_SILU),
    "qwen2": Architecture(name="qwen2", fixed=_SILU),
    "qwen2_moe": Architecture(
        name="qwen2moe", fixed=_SILU | _SPARSE | {"norm_topk_prob": (False,), "tie_word_embeddings": (False,)}),
    "qwen3": Architecture(name="qwen3", fixed=_SILU | _PLAIN),
    "qwen3_moe": Architecture(name="qwen3moe", fixed=_SILU | _PLAIN | _SPARSE | {"norm_topk_prob": (True,)}),
    "smollm3": Architecture(
        name="smollm3", permuted=True, full_rope_period=4, fixed=_SILU | _PLAIN | {"mlp_bias": (False,)}),
}  # fmt: skip

_ROTATED = re.compile(r"\.self_attn\.(?P<kind>[qk])_proj$")
_FUSED_EXPERTS = ".mlp.experts.gate_up_proj"
_EXPERTS = ".mlp.experts."
_SHARED_GATE = ".mlp.shared_expert_gate.weight"


def architecture(model_type: str) -> Architecture:
    """What is special about a transformers model type.

    Raises:
        UsageError: its layout in GGUF files is not known here.

    >>> architecture("mistral").name
    'llama'
    """
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UsageError(f"format gguf: found model type {model_type}; needed one of {known}; {_INSTEAD}")
    return ARCHITECTURES[model_type]


def check(config: Any) -> None:
    """Refuse a configuration that llama.cpp would compute otherwise than transformers.

    Raises:
        UsageError: naming the setting.
    """
    arch = architecture(config.model_type)
    for name, allowed in arch.fixed.items():
        _require(config, name, getattr(config, name), *allowed)
    for name in arch.needed:
        if getattr(config, name) is None:
            raise UsageError(f"{config.model_type}: {name}: found none; needed a number in GGUF files; {_INSTEAD}")
    for kind, parameters in rope_parameters(config).items():
        _check_rope(config, arch.rope_types if kind == "full_attention" else ("default",), parameters)
    layers = range(1, config.num_hidden_layers + 1)
    if arch.window_period:
        kinds = ["sliding_attention" if layer % arch.window_period else "full_attention" for layer in layers]
        _require(config, "layer_types", config.layer_types, kinds)
    if arch.full_rope_period:
        rotated = [int(layer % arch.full_rope_period != 0) for layer in layers]
        _require(config, "no_rope_layers", config.no_rope_layers, rotated)
    if arch.wide_scale_layers:
        wide = config.num_hidden_layers == arch.wide_scale_layers
        scale = config.hidden_size // config.num_attention_heads if wide else head_dim(config)
        _require(config, "query_pre_attn_scalar", config.query_pre_attn_scalar, scale)


def _check_rope(config: Any, types: tuple[str, ...], parameters: dict[str, Any]) -> None:
    _require(config, "rope_type", parameters["rope_type"], *types)
    if config.model_type != "phi3":
        _require(config, "partial_rotary_factor", parameters.get("partial_rotary_factor"), None, 1.0)
    if parameters["rope_type"] == "yarn":
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            _require(config, name, parameters.get(name), None)
        _require(config, "truncate", parameters.get("truncate"), None, True)


def _require(config: Any, name: str, found: Any, *allowed: Any) -> None:
    if found not in allowed:
        needed = " or ".join(map(str, allowed))
        raise UsageError(f"{config.model_type}: {name}: found {found}; needed {needed} in GGUF files; {_INSTEAD}")


def rope_parameters(config: Any) -> dict[str, dict[str, Any]]:
    """Parameters of the rotary positions by the kind of attention, "full_attention" being one of the kinds."""
    parameters: dict[str, Any] = config.rope_parameters
    return parameters if "full_attention" in parameters else {"full_attention": parameters}


def head_dim(config: Any) -> int:
    """Size of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def tensor_names(config: Any, name: str) -> tuple[str, ...]:
    """Names in the file of a tensor of the model.

    Args:
        config: of the model.
        name: of a parameter, such as "model.layers.3.self_attn.q_proj.weight".

    Returns:
        One name; two for the fused ``gate_up_proj`` of experts, whose rows are stored in two halves; none for a head
        tied to the embedding.

    Raises:
        UsageError: the architecture has no such tensor in GGUF files.
    """
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return ()
    if name.endswith(_FUSED_EXPERTS):
        parts = [name.replace("gate_up_proj", f"{part}_proj.weight") for part in ("gate", "up")]
    else:
        parts = [f"{name}.weight" if _EXPERTS in name else name]
    known = _name_map(architecture(config.model_type).name, config.num_hidden_layers)
    stored = [known.get_name(part, try_suffixes=(".weight", ".bias")) for part in parts]
    if None in stored:
        raise UsageError(
            f"{name}: found a tensor that GGUF files of {config.model_type} do not have; needed none; {_INSTEAD}"
        )
    return tuple(map(str, stored))


@cache
def _name_map(arch: str, layers: int) -> gguf.TensorNameMap:
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return gguf.get_tensor_name_map(number, layers)


def row_order(config: Any, path: str) -> Tensor | None:
    """In what order the rows of a layer's weight, bias or codes are stored.

    Args:
        config: of the model.
        path: of the layer's module, such as "model.layers.3.self_attn.q_proj".

    Returns:
        int64 (O,) with ``stored = weight_OI[order_O]``; None if they stay as they are.
    """
    match = _ROTATED.search(path)
    if match is None or not architecture(config.model_type).permuted:
        return None
    heads = config.num_attention_heads if match["kind"] == "q" else config.num_key_value_heads
    rows = torch.arange(heads * head_dim(config))
    return rows.view(heads, 2, -1).transpose(1, 2).flatten()


def stored_float(config: Any, name: str, tensor: Tensor) -> tuple[Tensor, ...]:
    """What is stored of a tensor that is not quantized.

    Args:
        config: of the model.
        name: of a parameter.
        tensor: its value, or a tensor on the meta device to learn the shapes.

    Returns:
        A tensor for each of ``tensor_names``; vectors as float32, others in their own dtype.
    """
    names = tensor_names(config, name)
    if len(names) == 2:
        return tensor.chunk(2, dim=1)
    if name.endswith(_SHARED_GATE):
        tensor = tensor.flatten()
    order_O = row_order(config, name.removesuffix(".weight").removesuffix(".bias"))
    if order_O is not None:
        tensor = tensor[order_O.to(tensor.device)]
    if tensor.ndim == 1:
        tensor = tensor.float()
    if name.endswith("norm.weight"):
        tensor = tensor + architecture(config.model_type).norm_offset
    return (tensor,) * len(names)
