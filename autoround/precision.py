"""In which dtype tensors are held: transformers keeps some in float32, whatever the others are in."""

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtypes: TypeAlias = Callable[[str], torch.dtype]


def held_dtypes(model: "PreTrainedModel", dtype: torch.dtype) -> Dtypes:
    """Name of a parameter or buffer -> the dtype in which ``from_pretrained(dtype=…)`` holds it, where it is a number.

    Biases of routers are the usual exception: bfloat16 would round them by more than they differ from each other.

    Args:
        model: with the names that its class and the parts of it keep in float32; names within a block will do as well.
        dtype: of all others.
    """
    kept = re.compile("|".join(name.replace("*", ".*") for name in model._get_dtype_plan(dtype)) or "$^")
    return lambda name: torch.float32 if kept.search(name) else dtype


def cast(tensors: Mapping[str, Tensor], dtypes: Dtypes) -> dict[str, Tensor]:
    """The floating-point ones in their dtypes; the others as they are.

    >>> tensors = {"norm.weight": torch.ones(1), "index": torch.arange(1)}
    >>> [tensor.dtype for tensor in cast(tensors, lambda name: torch.bfloat16).values()]
    [torch.bfloat16, torch.int64]
    """
    return {name: tensor.to(dtypes(name)) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
