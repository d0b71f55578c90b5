"""Layers whose weights a model reads itself, as Mamba does that of ``dt_proj``: no packed layer can replace them."""

import dis
import inspect
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from types import FunctionType

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from autoround.func import linear_paths
from autoround.model.copies import without_data
from autoround.model.skeleton import sees_images

# Methods that give weights their first values; forwards call none of them.
_BEGINNINGS = ("__init__", "_init", "init", "reset")
_TOKENS = 4


def read_directly(skeleton: PreTrainedModel) -> frozenset[str]:
    """Paths of the linear layers whose weights are read by other modules in a forward.

    Where the code of some class says so, a forward without data tells whether that happens; if the model does not run
    without data, or not that layer, as text runs no tower for images, the code is believed.
    """
    linear = (path for path in linear_paths(skeleton) if isinstance(skeleton.get_submodule(path), nn.Linear))
    suspects = [path for path in linear if _suspected(skeleton, path)]
    certain = frozenset(path for path in suspects if _is_attention_of_torch(skeleton, path))
    if not suspects:
        return frozenset()
    with FakeTensorMode(), torch.no_grad():
        model = without_data(skeleton, torch.bfloat16)  # in which experts run without data too
        watched = {path: _Watched(model.get_submodule(path)) for path in suspects}
        for path, module in watched.items():
            model.set_submodule(path, module)
        try:
            model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.int64), use_cache=False)
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            return frozenset(suspects)
    blind = sees_images(skeleton.config)
    found = (path for path, module in watched.items() if module.is_read or (blind and not module.is_called))
    return certain | frozenset(found)


class _Watched(nn.Linear):
    """A linear layer that notes whether others read its weight."""

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.is_read = self.is_called = False
        vars(self).update(vars(layer))

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        self.is_read = True
        return self.get_parameter("weight")

    def get_parameter(self, target: str) -> nn.Parameter:
        parameter = self._parameters[target]
        assert parameter is not None
        return parameter

    def forward(self, x: Tensor) -> Tensor:
        self.is_called = True
        return nn.functional.linear(x, self.get_parameter("weight"), self.bias)


def _is_attention_of_torch(skeleton: nn.Module, path: str) -> bool:
    return isinstance(skeleton.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention)


def _suspected(skeleton: nn.Module, path: str) -> bool:
    """Whether the class of a module above a layer has a method that says ``<the layer's name>.weight``."""
    if _is_attention_of_torch(skeleton, path):
        return True
    *above, name = path.split(".")
    parents = (skeleton.get_submodule(".".join(above[:depth])) for depth in range(len(above) + 1))
    return any(name in _weights_read(type(parent)) for parent in parents)  # type: ignore[arg-type]


@cache
def _weights_read(kind: type[nn.Module]) -> frozenset[str]:
    """Names x of which the methods of a class say ``x.weight``."""
    return frozenset(_say(kind))


def _say(kind: type[nn.Module]) -> Iterator[str]:
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        if base.__module__.startswith(("torch.", "transformers.modeling_utils", "transformers.generation")):
            continue
        for name, method in vars(base).items():
            function = inspect.unwrap(method) if callable(method) else None
            if isinstance(function, FunctionType) and not name.startswith(_BEGINNINGS):
                for one, two in pairwise(dis.get_instructions(function)):
                    if one.opname == two.opname == "LOAD_ATTR" and two.argval == "weight":
                        yield str(one.argval)
