"""The table of exceptions: what has to be known of single model types because their structure does not tell it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Oddity:
    """An exception.

    Attributes:
        numerics: names of numeric choices -> what they have to be.
        experts: class of modules of experts -> attributes that others have to tell how their stacks lie.
        routers: ends of the paths of layers that choose experts, where they are not beside these.
        settings: of the configuration -> what they have to be, in the folders that are written too.
        why: the reason, for readers of this table.
    """

    numerics: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    routers: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    why: str


ODDITIES: Mapping[str, Oddity] = {
    "llama4_text": Oddity(
        experts={"Llama4TextExperts": {"is_transposed": True, "has_gate": True, "has_bias": False}},
        why="its experts are given tokens sorted by expert, all of them, those not chosen as zeros",
    ),
    "jetmoe": Oddity(routers=("router.layer",), why="its experts are lists of modules that share a router's order"),
    "rwkv": Oddity(
        settings={"rescale_every": 0},
        why="it halves hidden states after every sixth block and divides weights of the later ones in place, against "
        "overflows of float16: but for epsilons of norms nothing changes, and packed weights cannot be divided",
    ),
    "xlstm": Oddity(
        numerics={"dtype": "float32"},
        why="its recurrence multiplies its float32 gates by values in the dtype of the weights",
    ),
}


def needed_numerics(model_type: str) -> Mapping[str, str]:
    """Numeric choices that a model type leaves no choice in; empty for nearly all.

    >>> needed_numerics("xlstm"), needed_numerics("llama")
    ({'dtype': 'float32'}, {})
    """
    return ODDITIES[model_type].numerics if model_type in ODDITIES else {}


def needed_settings(model_type: str) -> Mapping[str, Any]:
    """Settings of a configuration that a model type leaves no choice in; empty for nearly all.

    >>> needed_settings("rwkv"), needed_settings("llama")
    ({'rescale_every': 0}, {})
    """
    return ODDITIES[model_type].settings if model_type in ODDITIES else {}


def _gate(module: Any, gate_up_NF: Tensor) -> Tensor:
    """What is between the projections of most experts."""
    gate_NI, up_NI = gate_up_NF.chunk(2, -1)
    gated_NI: Tensor = module.act_fn(gate_NI) * up_NI
    return gated_NI


def is_router(path: str) -> bool:
    """Whether the table says that a layer chooses experts.

    >>> is_router("model.layers.0.mlp.router.layer"), is_router("model.layers.0.mlp.up_proj")
    (True, False)
    """
    return path.endswith(tuple(f".{each}" for oddity in ODDITIES.values() for each in oddity.routers))


def mark_experts(model: nn.Module) -> None:
    """Give modules of experts the attributes that the table has for their classes."""
    known = {name: own for oddity in ODDITIES.values() for name, own in oddity.experts.items()}
    for module in model.modules():
        if (own := known.get(type(module).__name__)) is not None:
            vars(module).update(own, _apply_gate=MethodType(_gate, module))
