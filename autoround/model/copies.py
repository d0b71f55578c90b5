"""Copies of modules without data."""

import copy
from typing import TypeVar

import torch
from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)


def without_data(module: Kind, dtype: torch.dtype) -> Kind:
    """A copy whose tensors have shapes and dtypes alone, and floating-point weights the one given.

    To be called in a ``FakeTensorMode``, in which the copy runs.
    """
    memo: dict[int, object] = {id(each): torch.empty(each.shape, dtype=each.dtype) for each in module.buffers()}
    for parameter in module.parameters():
        own = dtype if parameter.is_floating_point() else parameter.dtype
        memo[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=own), requires_grad=False)
    return copy.deepcopy(module, memo)
