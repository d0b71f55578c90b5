"""Buffers that no checkpoint holds, such as tables of positions and masks: what a model gives them when it is built."""

import copy
from collections.abc import Iterable

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel


def refill(model: PreTrainedModel, paths: Iterable[str]) -> None:
    """Give some modules' own buffers that are not saved the values of a newly built model.

    Loading leaves them undefined where it was told not to initialize the module.

    Args:
        model: with all buffers in memory; changed in place.
        paths: of the modules.
    """
    names = [f"{path}.{name}" for path in dict.fromkeys(paths) for name in _unsaved(model.get_submodule(path))]
    if not names:
        return
    with init_empty_weights(include_buffers=False):
        fresh = type(model)(copy.deepcopy(model.config))
    with torch.no_grad():
        for name in names:
            model.get_buffer(name).copy_(fresh.get_buffer(name))


def _unsaved(module: nn.Module) -> tuple[str, ...]:
    saved = module.state_dict()
    return tuple(name for name, buffer in module.named_buffers(recurse=False) if name not in saved)
