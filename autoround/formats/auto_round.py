"""The layout ``auto_round``: GPTQ tensors without g_idx under ``quant_method: auto-round``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autoround.formats import gptq_layout
from autoround.formats.rules import RULES
from autoround.func.types import IntCodes
from autoround.plan import FormatRules, Plan
from autoround.spec import QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoRound:
    """Symmetric codes are stored with ``zero - 1`` (packing ``auto_round:auto_gptq``), which most servers read;
    asymmetric ones with the true zero point (packing ``auto_round``), since 0 is one of them."""

    rules: FormatRules = RULES["auto_round"]
    dtype: str | None = None
    config_copies: tuple[str, ...] = ()

    def pack(self, codes: IntCodes, spec: QuantSpec) -> dict[str, Tensor]:
        return gptq_layout.pack_layer(codes, spec, zero_offset=int(spec.sym))

    def unpack(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> IntCodes:
        return gptq_layout.unpack_layer(tensors, spec, zero_offset=int(spec.sym))

    def config(self, plan: Plan) -> dict[str, Any]:
        """``extra_config`` names every layer inside the blocks that differs from the whole, by its exact path."""
        config: dict[str, Any] = {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq" if plan.spec.sym else "auto_round",
            "bits": plan.spec.bits,
            "group_size": plan.spec.group_size,
            "sym": plan.spec.sym,
            "data_type": "int",
            "block_name_to_quantize": ",".join(dict.fromkeys(block.path.rpartition(".")[0] for block in plan.blocks)),
        }
        if exceptions := _exceptions(plan):
            config["extra_config"] = exceptions
        return config


def _exceptions(plan: Plan) -> dict[str, dict[str, Any]]:
    """Path -> settings that differ from the plan's own."""
    exceptions: dict[str, dict[str, Any]] = {}
    for layer in (layer for block in plan.blocks for layer in block.layers):
        if layer.spec is None:
            exceptions[layer.shape.path] = {"bits": 16, "data_type": "fp"}
        elif layer.spec.group_size != plan.spec.group_size:
            exceptions[layer.shape.path] = {"group_size": layer.spec.group_size}
    return exceptions


AUTO_ROUND = AutoRound()
