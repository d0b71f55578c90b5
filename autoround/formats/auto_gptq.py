"""The layout ``auto_gptq``: GPTQ tensors, version 1 (``checkpoint_format: gptq``), with g_idx."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoround.errors import FormatError
from autoround.formats import gptq_layout
from autoround.formats.rules import RULES
from autoround.func.types import IntCodes
from autoround.plan import FormatRules, Plan
from autoround.spec import QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoGptq:
    """One group size for the whole model, float16 scales, ``zero - 1`` in the file."""

    rules: FormatRules = RULES["auto_gptq"]
    dtype: str | None = "float16"
    config_copies: tuple[str, ...] = ("quantize_config.json", "quantization_config.json")

    def pack(self, codes: IntCodes, spec: QuantSpec) -> dict[str, Tensor]:
        if codes.scale_OG.dtype != torch.float16:
            raise FormatError(f"found {codes.scale_OG.dtype} scales; needed float16; use --scale_dtype float16")
        in_features = codes.q_OI.shape[1]
        g_idx = torch.arange(in_features, dtype=torch.int32) // spec.group_of(in_features)
        return gptq_layout.pack_layer(codes, spec, zero_offset=1) | {"g_idx": g_idx}

    def unpack(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> IntCodes:
        group = spec.group_of(len(tensors["g_idx"]))
        expected = [column // group for column in range(len(tensors["g_idx"]))]
        if tensors["g_idx"].tolist() != expected:
            raise FormatError(f"found columns out of order in g_idx; needed column // {group}")
        return gptq_layout.unpack_layer(tensors, spec, zero_offset=1)

    def config(self, plan: Plan) -> dict[str, Any]:
        """Layers kept inside the blocks are named twice: by exclusion (``dynamic``) for loaders that follow it and,
        where all blocks keep the same ones, by an allow-list (``modules_in_block_to_quantize``) for the others."""
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": plan.spec.bits,
            "group_size": plan.spec.group_size,
            "sym": plan.spec.sym,
            "data_type": "int",
            "desc_act": False,
            "true_sequential": False,
            "damp_percent": 0.01,
            "lm_head": False,
        }
        kept = [layer.shape.path for block in plan.blocks for layer in block.layers if layer.spec is None]
        if kept:
            config["dynamic"] = {f"-:^{re.escape(path)}$": {} for path in kept}
            allowed = {tuple(block.specs) for block in plan.blocks}
            if len(allowed) == 1:
                config["modules_in_block_to_quantize"] = [list(*allowed)]
        return config


AUTO_GPTQ = AutoGptq()
