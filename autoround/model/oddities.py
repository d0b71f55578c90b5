"""The table of exceptions: what has to be known of single model types because their structure does not tell it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Oddity:
    """An exception.

    Attributes:
        numerics: names of numeric choices -> what they have to be.
        why: the reason, for readers of this table.
    """

    numerics: Mapping[str, str] = field(default_factory=dict)
    why: str


ODDITIES: Mapping[str, Oddity] = {
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
