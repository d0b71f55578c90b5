"""Quality of quantized models: scores against the float model, and lm-eval's tasks. Torch-free until it is used."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoround.evaluate.run import evaluate as evaluate
    from autoround.evaluate.run import prepare as prepare
    from autoround.evaluate.scores import TokenScores as TokenScores
    from autoround.evaluate.scores import compare as compare
    from autoround.evaluate.settings import Access as Access
    from autoround.evaluate.settings import Evaluation as Evaluation
    from autoround.evaluate.stream import compare_streamed as compare_streamed

__all__ = ["Access", "Evaluation", "TokenScores", "compare", "compare_streamed", "evaluate", "prepare"]

_HOMES = {
    "Access": "autoround.evaluate.settings",
    "Evaluation": "autoround.evaluate.settings",
    "TokenScores": "autoround.evaluate.scores",
    "compare": "autoround.evaluate.scores",
    "compare_streamed": "autoround.evaluate.stream",
    "evaluate": "autoround.evaluate.run",
    "prepare": "autoround.evaluate.run",
}


def __getattr__(name: str) -> object:
    """Import a public name's module when the name is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
