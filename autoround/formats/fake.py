"""The layout ``fake``: rounded weights in an ordinary checkpoint that every loader reads."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from autoround.formats.rules import RULES
from autoround.func.rounding import dequantize
from autoround.func.types import IntCodes
from autoround.plan import FormatRules, Plan
from autoround.spec import QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Fake:
    """Weights are dequantized in float32; the writer casts them to the dtype of the weight they replace."""

    rules: FormatRules = RULES["fake"]
    dtype: str | None = None
    config_copies: tuple[str, ...] = ()

    def suited(self, plan: Plan) -> "Fake":
        del plan  # nothing to choose
        return self

    def pack(self, codes: IntCodes, spec: QuantSpec) -> dict[str, Tensor]:
        return {"weight": dequantize(codes, spec)}

    def unpack(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> Tensor:
        del spec  # nothing is encoded
        return tensors["weight"]

    def config(self, plan: Plan) -> None:
        del plan  # an ordinary checkpoint has no quantization config


FAKE = Fake()
