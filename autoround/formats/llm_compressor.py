"""The layout ``llm_compressor``: compressed-tensors, "pack-quantized".

Legend: O output features, I input features, G groups in a row.

| name              | dtype       | shape              |
|-------------------|-------------|--------------------|
| weight_packed     | int32       | (O, I * bits / 32) |
| weight_scale      | scale dtype | (O, G)             |
| weight_zero_point | int32       | (O * bits / 32, G) |
| weight_shape      | int64       | (2,): O, I         |

Symmetric layers have no zero points. Codes and zero points lie unsigned in the file; their loader subtracts
``2**(bits-1)`` from both.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoround.errors import FormatError
from autoround.formats.bits import pack_stream, unpack_stream
from autoround.formats.layer_names import absent, named
from autoround.formats.rules import RULES
from autoround.func.types import IntCodes
from autoround.plan import FormatRules, Plan
from autoround.spec import WHOLE_ROW, QuantSpec, WeightSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmCompressor:
    """Any group size, mixed ones in groups of their own; linear layers only."""

    rules: FormatRules = RULES["llm_compressor"]
    dtype: str | None = None
    config_copies: tuple[str, ...] = ()

    def suited(self, plan: Plan) -> "LlmCompressor":
        del plan  # one packing serves all
        return self

    def pack(self, codes: IntCodes, spec: QuantSpec) -> dict[str, Tensor]:
        if spec.sym and bool((codes.zero_OG != spec.midpoint).any()):
            raise FormatError(f"found zero points other than {spec.midpoint}; needed none for symmetric codes")
        tensors = {
            "weight_packed": pack_stream(codes.q_OI, spec.bits),
            "weight_scale": codes.scale_OG.contiguous(),
            "weight_shape": torch.tensor(codes.q_OI.shape),
        }
        if not spec.sym:
            tensors["weight_zero_point"] = pack_stream(codes.zero_OG.t(), spec.bits).t().contiguous()
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> IntCodes:
        scale_OG = tensors["weight_scale"]
        zero_OG = torch.full(scale_OG.shape, spec.midpoint, dtype=torch.uint8)
        if not spec.sym:
            zero_OG = unpack_stream(tensors["weight_zero_point"].t(), spec.bits).t()
        q_OI = unpack_stream(tensors["weight_packed"], spec.bits)
        if tensors["weight_shape"].tolist() != list(q_OI.shape):
            raise FormatError(f"found weight_shape {tensors['weight_shape'].tolist()}; needed {list(q_OI.shape)}")
        return IntCodes(q_OI, scale_OG, zero_OG)

    def config(self, plan: Plan) -> dict[str, Any]:
        """Layers of one spec are the target of one group; where there are several, each names its layers."""
        members: dict[WeightSpec | None, list[str]] = defaultdict(list)
        for name, spec in named((layer.shape, layer.spec) for layer in plan.layers.values()):
            members[spec].append(name.path if name.exact else f"re:{name.pattern}$")
        kept = [*members.pop(None, []), *(f"re:{name.pattern}$" for name in absent(plan))]
        groups = {
            f"group_{index}": {
                "targets": ["Linear"] if len(members) == 1 else paths,
                "weights": _weights(spec),
                "input_activations": None,
                "output_activations": None,
            }
            for index, (spec, paths) in enumerate(members.items())
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": kept,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def _weights(spec: QuantSpec) -> dict[str, Any]:
    whole_row = spec.group_size == WHOLE_ROW
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.sym,
        "strategy": "channel" if whole_row else "group",
        "group_size": None if whole_row else spec.group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "block_structure": None,
    }


LLM_COMPRESSOR = LlmCompressor()
