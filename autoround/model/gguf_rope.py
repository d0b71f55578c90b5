"""Scaled rotary positions of GGUF files, which transformers leaves out where it reads one.

Legend: H pairs of a head's dimensions, which turn together.
"""

import copy
import math
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from autoround.errors import ModelError

FREQUENCIES = "rope_freqs.weight"
_EDGE = 1e-3


def rope_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The rotary positions of all blocks, or of those with full attention; empty where a configuration has none."""
    parameters: Any = getattr(config, "rope_parameters", None) or {}
    found: dict[str, Any] = parameters.get("full_attention", parameters)
    return found


def add_scaled_rope(config: PreTrainedConfig, rope: dict[str, Any], tensors: dict[str, Any], where: str) -> None:
    """Tell a configuration what a file says of its rotary positions and transformers does not read.

    Args:
        config: as transformers makes it of the file; changed.
        rope: the file's keys below ``ARCHITECTURE.rope.``.
        tensors: of the file by name.
        where: the file, for messages.

    Raises:
        ModelError: they are scaled in a way that a configuration cannot say.
    """
    own = rope_of(config)
    if own and own.get("rope_type", "default") == "default":
        own.update(_scaled(config, rope, tensors, where))


def _scaled(config: PreTrainedConfig, rope: dict[str, Any], tensors: dict[str, Any], where: str) -> dict[str, Any]:
    kind = str(rope.get("scaling.type", "none"))
    odd = next((name for name in tensors if name.startswith("rope_factors_")), kind)
    if FREQUENCIES in tensors:
        factors_H = torch.from_numpy(numpy.array(tensors[FREQUENCIES].data, dtype=numpy.float64)).flatten()
        found = _llama3(config, factors_H)
        if found is not None:
            return found
        odd = FREQUENCIES
    elif odd == "none":
        return {}
    elif odd == "linear":
        return {"rope_type": "linear", "factor": float(rope["scaling.factor"])}
    elif odd == "yarn":
        own = {"factor": float(rope["scaling.factor"]), "rope_type": "yarn"}
        named = {"scaling.original_context_length": "original_max_position_embeddings",
                 "scaling.yarn_beta_fast": "beta_fast", "scaling.yarn_beta_slow": "beta_slow"}  # fmt: skip
        return own | {name: rope[key] for key, name in named.items() if key in rope}
    raise ModelError(
        f"{where}: found rotary positions scaled by {odd}; needed those of Llama 3, linear or yarn ones; use the "
        "model's safetensors checkpoint"
    )


def _llama3(config: PreTrainedConfig, factors_H: Tensor) -> dict[str, Any] | None:
    """The settings by which Llama 3 stretches its wavelengths by these factors; None where there are none."""
    most = float(factors_H.max())
    if most <= 1:
        return {} if bool((factors_H == 1).all()) else None
    base_H = float(rope_of(config)["rope_theta"]) ** -(
        torch.arange(len(factors_H), dtype=torch.float64) / len(factors_H)
    )
    # 1 where a wavelength is kept and 0 where it is stretched by all; between, linear in the frequency
    kept_H = (1 / factors_H - 1 / most) / (1 - 1 / most)
    between_H = ((kept_H > _EDGE) & (kept_H < 1 - _EDGE)).nonzero().flatten()
    high, original = 4.0, 8192.0
    if len(between_H) > 1:
        first, last = int(between_H[0]), int(between_H[-1])
        slope = float((kept_H[first] - kept_H[last]) / (base_H[first] - base_H[last]))
        offset = float(kept_H[first]) - slope * float(base_H[first])
        if slope <= 0 or offset >= 0:
            return None
        high = 1 - 1 / offset
        original = slope * 2 * math.pi * (high - 1)
    found = {"rope_type": "llama3", "factor": most, "low_freq_factor": 1.0, "high_freq_factor": round(high, 3),
             "original_max_position_embeddings": round(original)}  # fmt: skip
    trial = copy.deepcopy(config)
    rope_of(trial).update(found)
    scaled_H, _ = ROPE_INIT_FUNCTIONS["llama3"](trial, torch.device("cpu"))
    same = len(scaled_H) == len(base_H) and torch.allclose(base_H / scaled_H.double(), factors_H, rtol=1e-3)
    return found if same else None
