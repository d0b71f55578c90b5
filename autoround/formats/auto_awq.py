"""The layout ``auto_awq``: AWQ tensors, version "gemm"."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autoround.formats import awq_layout, gptq_layout
from autoround.formats.layer_names import absent, named
from autoround.formats.rules import RULES
from autoround.func.types import IntCodes
from autoround.plan import FormatRules, Plan
from autoround.spec import QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoAwq:
    """One group size for the whole model, linear layers only, 4 bits, float16."""

    rules: FormatRules = RULES["auto_awq"]
    dtype: str | None = "float16"
    config_copies: tuple[str, ...] = ("quant_config.json",)

    def suited(self, plan: Plan) -> "AutoAwq":
        del plan  # one packing serves all
        return self

    def pack(self, codes: IntCodes, spec: QuantSpec) -> dict[str, Tensor]:
        del spec  # the codes say it all
        return awq_layout.pack_layer(codes)

    def unpack(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> IntCodes:
        del spec
        return awq_layout.unpack_layer(tensors)

    def config(self, plan: Plan) -> dict[str, Any]:
        """``zero_point`` is true for symmetric codes too: their zero points are in the file, and some loaders insist.
        auto-round takes codes for symmetric ones where ``sym`` is not told, and reads no zero points where it is true.

        Kept layers are named twice: as whole paths in ``modules_to_not_convert``, of which some loaders compare parts,
        and by exclusion (``dynamic``) for GPTQModel, which does not read the former.
        """
        config: dict[str, Any] = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": awq_layout.BITS,
            "group_size": plan.spec.group_size,
            "sym": all(spec.sym for spec in plan.specs.values() if isinstance(spec, QuantSpec)),
            "zero_point": True,
        }
        fates = named((layer.shape, layer.spec is None) for layer in plan.layers.values())
        if kept := [*(name for name, is_kept in fates if is_kept), *absent(plan)]:
            config["modules_to_not_convert"] = [name.path or name.pattern for name in kept]
            config["dynamic"] = gptq_layout.exclusions(kept)
        return config


AUTO_AWQ = AutoAwq()
