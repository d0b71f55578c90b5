"""Weight-only quantization of language models by learned rounding."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoround.engine import quantize as quantize
    from autoround.engine import quantize_each as quantize_each
    from autoround.hub import load as load
    from autoround.hub import register as register
    from autoround.intel.api import AutoRound as AutoRound
    from autoround.recipe import Recipe as Recipe
    from autoround.spec import QuantSpec as QuantSpec

__version__ = "0.1.0"
__all__ = ["AutoRound", "QuantSpec", "Recipe", "__version__", "load", "quantize", "quantize_each", "register"]

_HOMES = {
    "AutoRound": "autoround.intel.api",
    "QuantSpec": "autoround.spec",
    "Recipe": "autoround.recipe",
    "load": "autoround.hub",
    "quantize": "autoround.engine",
    "quantize_each": "autoround.engine",
    "register": "autoround.hub",
}


def __getattr__(name: str) -> object:
    """Import a public name's module when the name is first used, so that importing the package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
