"""The layout ``auto_round``: GPTQ or AWQ tensors under ``quant_method: auto-round``, in one of four packings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autoround.formats import awq_layout, gptq_layout
from autoround.formats.layer_names import Name, absent, named
from autoround.formats.rules import RULES
from autoround.func.types import IntCodes
from autoround.plan import FormatRules, Plan, holds
from autoround.spec import QuantSpec, WeightSpec

ZERO_MINUS_ONE, AWQ, TRUE_ZERO, TRUE_ZERO_GIDX = (
    "auto_round:auto_gptq",
    "auto_round:auto_awq",
    "auto_round",
    "auto_round:gptqmodel",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoRound:
    """One packing of the layout; without one, ``suited`` chooses that which most loaders read.

    Symmetric codes go with ``zero - 1`` (auto_round:auto_gptq), asymmetric 4-bit codes as AWQ does where it takes the
    plan (auto_round:auto_awq): these two are what vLLM and SGLang read. Other asymmetric codes keep their true zero
    points (auto_round), since 0 is one of them.
    """

    rules: FormatRules = RULES["auto_round"]
    packing: str = ""
    config_copies: tuple[str, ...] = ()

    @property
    def dtype(self) -> str | None:
        return "float16" if self.packing == AWQ else None

    def suited(self, plan: Plan) -> "AutoRound":
        if self.packing:
            return self
        if all(spec.sym for spec in plan.specs.values()):
            return AutoRound(packing=ZERO_MINUS_ONE)
        return AutoRound(packing=AWQ if holds(plan, RULES[AWQ]) else TRUE_ZERO)

    def pack(self, codes: IntCodes, spec: QuantSpec) -> dict[str, Tensor]:
        assert self.packing, "suited() comes first"
        if self.packing == AWQ:
            return awq_layout.pack_layer(codes)
        tensors = gptq_layout.pack_layer(codes, spec, zero_offset=int(self.packing == ZERO_MINUS_ONE))
        return tensors | ({"g_idx": gptq_layout.g_idx(codes, spec)} if self.packing == TRUE_ZERO_GIDX else {})

    def unpack(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> IntCodes:
        if self.packing == AWQ:
            return awq_layout.unpack_layer(tensors)
        if self.packing == TRUE_ZERO_GIDX:
            gptq_layout.check_g_idx(tensors["g_idx"], spec)
        return gptq_layout.unpack_layer(tensors, spec, zero_offset=int(self.packing == ZERO_MINUS_ONE))

    def config(self, plan: Plan) -> dict[str, Any]:
        """``extra_config`` names, by their exact paths, layers of blocks that differ from the whole and those outside
        that are quantized, with all their settings: vLLM takes a layer whose bits are not told for a float one. Keys
        for stacks of experts and for modules that the model does not have are patterns, which are searched for."""
        config: dict[str, Any] = {
            "quant_method": "auto-round",
            "packing_format": self.packing,
            **gptq_layout.settings(plan.spec),
            "data_type": "int",
            "block_name_to_quantize": ",".join(dict.fromkeys(block.path.rpartition(".")[0] for block in plan.blocks)),
        }
        if exceptions := _exceptions(plan):
            config["extra_config"] = exceptions
        return config


def _exceptions(plan: Plan) -> dict[str, dict[str, Any]]:
    """Path or pattern -> settings of layers that differ from the plan's own or are outside the blocks."""
    usual = _settings(plan.spec)
    inside = named((layer.shape, _settings(layer.spec)) for block in plan.blocks for layer in block.layers)
    exceptions = {_key(name): own for name, own in inside if own != usual}
    exceptions |= {_key(name): _settings(None) for name in absent(plan)}
    outside = {layer.shape.path: _settings(layer.spec) for layer in plan.outside if layer.spec is not None}
    return exceptions | outside


def _key(name: Name) -> str:
    return name.path if name.exact else f"^{name.pattern}$"


def _settings(spec: WeightSpec | None) -> dict[str, Any]:
    return {"bits": 16, "data_type": "fp"} if spec is None else gptq_layout.settings(spec) | {"data_type": "int"}


AUTO_ROUND = AutoRound()
AUTO_ROUND_GPTQ = AutoRound(rules=RULES[ZERO_MINUS_ONE], packing=ZERO_MINUS_ONE)
AUTO_ROUND_AWQ = AutoRound(rules=RULES[AWQ], packing=AWQ)
AUTO_ROUND_GPTQMODEL = AutoRound(rules=RULES[TRUE_ZERO_GIDX], packing=TRUE_ZERO_GIDX)
