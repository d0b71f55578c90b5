"""How a quantized checkpoint stores its layers, found from its quantization config and the shapes of its tensors.

Legend: O output features, I input features, G groups in a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autoround.errors import FormatError
from autoround.formats import awq_layout, gptq_layout
from autoround.formats.bits import unpack_stream
from autoround.formats.llm_compressor import LLM_COMPRESSOR
from autoround.func.types import IntCodes
from autoround.spec import BITS, WHOLE_ROW, QuantSpec

METHODS = ("auto-round", "gptq", "awq", "compressed-tensors")
# Quantization method -> the key of its config that names the variant, the default, and each variant's format.
_VARIANTS: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "auto-round": (
        "packing_format",
        "auto_round:gptq",
        {
            "auto_round:auto_gptq": "auto_round:auto_gptq",
            "auto_round:gptq": "auto_round:auto_gptq",
            "auto_round": "auto_round:gptqmodel",
            "auto_round:gptqmodel": "auto_round:gptqmodel",
            "auto_round:auto_awq": "auto_awq",
            "auto_round:awq": "auto_awq",
        },
    ),
    "gptq": ("checkpoint_format", "gptq", {"gptq": "auto_gptq", "gptq_v2": "gptq_v2"}),
    "awq": ("version", "gemm", {"gemm": "auto_awq"}),
    "compressed-tensors": ("format", "pack-quantized", {"pack-quantized": "llm_compressor"}),
}
_GPTQ_TENSORS = ("qweight", "qzeros", "scales")
_CT_TENSORS = ("weight_packed", "weight_scale", "weight_shape")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How packed layers are stored.

    Attributes:
        name: of the format.
        needed: last names of the tensors that every packed layer has; the first tells that a layer is packed.
        optional: of those that a layer may have.
        zero_offset: what GPTQ tensors subtract from zero points; None for other tensors.
        group_sizes: that its quantization config names, for the whole model and for single layers.
    """

    name: str
    needed: tuple[str, ...] = _GPTQ_TENSORS
    optional: tuple[str, ...] = ()
    zero_offset: int | None = None
    group_sizes: frozenset[int] = frozenset()

    def layers(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The packed layers among a checkpoint's tensors: name of the layer -> its tensors by their last names."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            layer, _, kind = name.rpartition(".")
            if kind in (*self.needed, *self.optional):
                found.setdefault(layer, {})[kind] = tensor
        return {layer: own for layer, own in found.items() if self.needed[0] in own}

    def spec(self, tensors: Mapping[str, Tensor], in_features: int, path: str) -> QuantSpec:
        """How a layer is stored, from the shapes of its tensors, which may be without data.

        Raises:
            FormatError: a tensor is missing, or their shapes are not those of such a layer.
        """
        if missing := [kind for kind in self.needed if kind not in tensors]:
            raise FormatError(f"{path}: found {self.needed[0]} without {missing[0]}; needed {', '.join(self.needed)}")
        packed, (rows, groups) = tensors[self.needed[0]], self._rows_and_groups(tensors)
        bits = packed.numel() * 32 // max(1, in_features * rows)
        whole = packed.numel() * 32 == bits * in_features * rows and in_features % max(groups, 1) == 0
        if bits not in BITS or not whole:
            raise FormatError(
                f"{path}: found {self.needed[0]} of shape {tuple(packed.shape)} with {groups} groups a row; needed "
                f"{in_features} input features of {', '.join(map(str, BITS))} bits; config.json and the weights do not "
                "belong together"
            )
        return QuantSpec(
            bits=bits,
            group_size=self._group_size(in_features, groups),
            sym=self.name == "llm_compressor" and "weight_zero_point" not in tensors,
            scale_dtype=str(tensors[self._scale].dtype).removeprefix("torch."),
        )

    def is_symmetric(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> bool:
        """Whether a layer's zero points are those of symmetric codes, which configs tell of whole models at most.

        Args:
            tensors: those whose names have "zero" in them, with data.
            spec: its bits.
        """
        if self.name == "llm_compressor":
            return spec.sym
        zeros = tensors["qzeros"]
        zero_GO = awq_layout.unpack_columns(zeros) if self.zero_offset is None else unpack_stream(zeros, spec.bits)
        return bool((zero_GO == spec.midpoint - (self.zero_offset or 0)).all())

    def codes(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> IntCodes:
        """A layer's codes, from tensors with data.

        Raises:
            FormatError: columns are not in order.
        """
        if self.zero_offset is None:
            return awq_layout.unpack_layer(tensors) if self.name == "auto_awq" else LLM_COMPRESSOR.unpack(tensors, spec)
        if "g_idx" in tensors:
            gptq_layout.check_g_idx(tensors["g_idx"], spec)
        return gptq_layout.unpack_layer(tensors, spec, zero_offset=self.zero_offset)

    def _group_size(self, in_features: int, groups: int) -> int:
        """A single group in a row is a whole row unless the config knows its length as a group size."""
        alone = groups == 1 and WHOLE_ROW in self.group_sizes and in_features not in self.group_sizes
        return WHOLE_ROW if alone else in_features // groups

    @property
    def _scale(self) -> str:
        return next(kind for kind in self.needed if "scale" in kind)

    def _rows_and_groups(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        first, second = tensors[self._scale].shape
        return (first, second) if self.name == "llm_compressor" else (second, first)


def stored(config: Mapping[str, Any], where: str) -> Stored:
    """How a checkpoint stores its layers, by its quantization config.

    Args:
        config: the ``quantization_config``.
        where: the checkpoint, for messages.

    Raises:
        FormatError: a layout that this package does not read.

    >>> stored({"quant_method": "gptq", "checkpoint_format": "gptq"}, "folder").zero_offset
    1
    """
    method = config.get("quant_method")
    if method not in _VARIANTS:
        raise FormatError(
            f"{where}: found quant_method {method!r}; needed one of {', '.join(METHODS)}; "
            "load it with the tool that made it"
        )
    key, default, variants = _VARIANTS[method]
    variant = config.get(key, config.get("format", default))
    if variant not in variants:
        raise FormatError(
            f"{where}: found {key} {variant!r}; needed one of {', '.join(variants)}; load it with the tool that made it"
        )
    name = variants[variant]
    if name == "llm_compressor":
        weights = [group["weights"] for group in config.get("config_groups", {}).values()]
        if order := next((own["actorder"] for own in weights if own.get("actorder") in ("group", "dynamic")), None):
            raise FormatError(f"{where}: found actorder {order!r}; needed columns in order; load it with vLLM")
        sizes = [own.get("group_size") or WHOLE_ROW for own in weights]
        return Stored(name=name, needed=_CT_TENSORS, optional=("weight_zero_point",), group_sizes=frozenset(sizes))
    own = (*(config.get("extra_config") or {}).values(), *(config.get("dynamic") or {}).values())
    named = frozenset(each["group_size"] for each in (config, *own) if each and "group_size" in each)
    if name == "auto_awq":
        return Stored(name=name, group_sizes=named)
    offset = int(name in ("auto_gptq", "auto_round:auto_gptq"))
    return Stored(name=name, optional=("g_idx",), zero_offset=offset, group_sizes=named)
