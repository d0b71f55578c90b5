"""The layout ``auto_gptq``: GPTQ tensors with g_idx, version 1 (``checkpoint_format: gptq``) or 2 (``gptq_v2``)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autoround.formats import gptq_layout
from autoround.formats.rules import RULES
from autoround.func.types import IntCodes
from autoround.plan import FormatRules, Plan
from autoround.spec import QuantSpec

# Where optimum looks for blocks.
_BLOCK_LISTS = (
    "transformer.h",
    "model.decoder.layers",
    "gpt_neox.layers",
    "model.layers",
    "model.language_model.layers",
    "h",
    "decoder.layers",
    "layers",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoGptq:
    """Float16 scales; version 1 holds ``zero - 1``, version 2 the zero itself.

    Layers may differ from the whole, which GPTQModel reads and transformers with optimum does not.
    """

    rules: FormatRules = RULES["auto_gptq"]
    checkpoint_format: str = "gptq"
    dtype: str | None = "float16"
    config_copies: tuple[str, ...] = ("quantize_config.json", "quantization_config.json")

    @property
    def _zero_offset(self) -> int:
        return int(self.checkpoint_format == "gptq")

    def suited(self, plan: Plan) -> "AutoGptq":
        del plan  # one packing serves all
        return self

    def pack(self, codes: IntCodes, spec: QuantSpec) -> dict[str, Tensor]:
        gptq_layout.check_half_scales(codes)
        tensors = gptq_layout.pack_layer(codes, spec, zero_offset=self._zero_offset)
        return tensors | {"g_idx": gptq_layout.g_idx(codes, spec)}

    def unpack(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> IntCodes:
        gptq_layout.check_g_idx(tensors["g_idx"], spec)
        return gptq_layout.unpack_layer(tensors, spec, zero_offset=self._zero_offset)

    def config(self, plan: Plan) -> dict[str, Any]:
        """Layers of blocks that differ are named in ``dynamic``, kept ones by exclusion. For loaders that do not follow
        it, an allow-list (``modules_in_block_to_quantize``) says what is not: in whole paths, since some loaders find
        parts of paths in towers for images too. Optimum is told where the blocks are if it would not find them.

        auto-round does not look at the version and reads every folder as version 1; one with a ``meta`` it refuses.
        """
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": self.checkpoint_format,
            **gptq_layout.settings(plan.spec),
            "data_type": "int",
            "desc_act": False,
            "true_sequential": False,
            "damp_percent": 0.01,
            "lm_head": False,
        }
        if self.checkpoint_format != "gptq":
            config["meta"] = {"quantizer": ["autoround"]}
        if dynamic := gptq_layout.overrides(plan):
            config["dynamic"] = dynamic
        lists = {block.path.rpartition(".")[0] for block in plan.blocks}
        if len(lists) == 1 and lists.isdisjoint(_BLOCK_LISTS):
            config["block_name_to_quantize"] = lists.pop()
        layers = [layer for block in plan.blocks for layer in block.layers]
        stacked = any(layer.shape.experts for layer in layers)  # whose names here are not those of the file
        if not stacked and any(layer.spec is None for layer in layers):
            config["modules_in_block_to_quantize"] = [[layer.shape.path for layer in layers if layer.spec]]
        return config


AUTO_GPTQ = AutoGptq()
GPTQ_V2 = AutoGptq(rules=RULES["gptq_v2"], checkpoint_format="gptq_v2")
