"""All that flows from block to block as one tensor (B, T, W).

State that blocks hand to later ones through a mapping, such as shared keys and values, travels beside the hidden
states in the last axis; several streams of hidden states, as Gemma 3n has, lie side by side there.

Legend: S streams, B samples, T tokens, H heads, D hidden size or size of a head, W all that lies side by side.
"""

from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_unflatten

from autoround.errors import ModelError
from autoround.model.calls import Fresh, Hidden, Seen
from autoround.model.copies import without_data

_HIDDEN = "hidden_states"
# Key of the mapping -> (heads, size of a head) of each tensor (B, H, T, D) that it has there.
Layout: TypeAlias = tuple[tuple[str, tuple[tuple[int, int], ...]], ...]
# No plain dict, so that a block which carries it already runs in the model's own way.
State: TypeAlias = UserDict[str, tuple[Tensor, ...]]


class Carried(NamedTuple):
    """What a block takes out of the tensor that it is given, and what it lays beside its hidden states.

    Attributes:
        argument: by which keyword it gets the mapping.
        streams: of hidden states; 0 where they are (B, T, D), not (S, B, T, D).
        width: of the hidden states of all streams.
        before: what is in the mapping when it is called.
        after: what is in it then.
    """

    argument: str
    streams: int
    width: int
    before: Layout
    after: Layout


def attach(skeleton: nn.Module, calls: Sequence[Seen]) -> None:
    """Let blocks that are given an empty mapping, to fill for later ones, take and return all as one tensor (B, T, W).

    They do so when they are called with a plain ``dict`` in place of the model's own kind of mapping, else what they
    did before.

    Args:
        skeleton: the model; hooks are added to these blocks, others are left alone.
        calls: of all blocks in order, with one sample.

    Raises:
        ModelError: a block puts something else into the mapping than tensors (B, H, T, D), or has several streams of
            hidden states and no mapping.
    """
    layout: Layout = ()
    for call in calls:
        names = [name for name, leaf in zip(call.names, call.leaves, strict=True) if isinstance(leaf, Fresh)]
        if not names and call.hidden.ndim > 3:
            shape = tuple(call.hidden.shape)
            raise ModelError(f"{call.block}: found hidden states of shape {shape}; needed (batch, tokens, size)")
        if not names:
            continue
        block, before = skeleton.get_submodule(call.block), layout
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            layout = _layout(_run(without_data(block, call.hidden.dtype), call, layout), call)
        if "carried" not in vars(block):
            block.register_forward_pre_hook(_take, with_kwargs=True)
            block.register_forward_hook(_lay_beside, with_kwargs=True)
        argument = names[0].removeprefix("[1]['").removesuffix("']")
        streams = len(call.hidden) if call.hidden.ndim == 4 else 0
        vars(block)["carried"] = Carried(argument, streams, call.hidden.shape[-1] * max(streams, 1), before, layout)


def fold(hidden: Tensor) -> Tensor:
    """Hidden states (B, T, D) as they are, (S, B, T, D) as (B, T, S * D).

    >>> fold(torch.ones(4, 1, 2, 3)).shape
    torch.Size([1, 2, 12])
    """
    return hidden if hidden.ndim == 3 else hidden.permute(1, 2, 0, 3).flatten(2)


def strip(block: nn.Module, hidden_BTW: Tensor) -> Tensor:
    """The hidden states alone of what a block returned, as the model has them.

    >>> strip(nn.Identity(), torch.ones(1, 2, 3)).shape
    torch.Size([1, 2, 3])
    """
    own: Carried | None = vars(block).get("carried")
    return hidden_BTW if own is None else _unfold(hidden_BTW[..., : own.width], own)


def _unfold(hidden_BTD: Tensor, own: Carried) -> Tensor:
    return hidden_BTD.unflatten(-1, (own.streams, -1)).permute(2, 0, 1, 3) if own.streams else hidden_BTD


def _run(block: nn.Module, call: Seen, layout: Layout) -> State:
    """What is in the mapping after a call without data."""
    hidden = torch.empty(call.hidden.shape, dtype=call.hidden.dtype)
    batch, tokens = hidden.shape[-3:-1]
    state = State({
        key: tuple(torch.empty(batch, heads, tokens, size, dtype=hidden.dtype) for heads, size in shapes)
        for key, shapes in layout
    })  # fmt: skip

    def fill(leaf: Any) -> Any:
        return hidden if isinstance(leaf, Hidden) else state if isinstance(leaf, Fresh) else leaf

    args, kwargs = tree_unflatten([fill(leaf) for leaf in call.leaves], call.spec)
    try:
        block(*args, **kwargs)
    except (RuntimeError, KeyError, TypeError) as error:
        raise ModelError(
            f"{call.block}: found a block that cannot be run without data ({error!r}); needed that to follow what it "
            "hands to later blocks; this model is not supported yet"
        ) from error
    return state


def _layout(state: Mapping[str, Any], call: Seen) -> Layout:
    for key, tensors in state.items():
        for tensor in tensors if isinstance(tensors, tuple) else (tensors,):
            if not isinstance(tensor, Tensor) or tensor.ndim != 4 or tensor.shape[2] != call.hidden.shape[-2]:
                found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ModelError(
                    f"{call.block}: found {found} handed to later blocks as {key}; needed tensors (batch, heads, "
                    "tokens, size); this model is not supported yet"
                )
    return tuple((key, tuple((tensor.shape[1], tensor.shape[3]) for tensor in own)) for key, own in state.items())


def _take(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The hook before a call."""
    own: Carried = vars(block)["carried"]
    if type(kwargs[own.argument]) is not dict:
        return args, kwargs
    hidden_BTW = args[0] if args else kwargs[_HIDDEN]
    sizes = [heads * size for _, shapes in own.before for heads, size in shapes]
    hidden_BTD, *parts = hidden_BTW.split([own.width, *sizes], dim=-1)
    rest: Iterator[Tensor] = iter(parts)
    state = {
        key: tuple(next(rest).unflatten(-1, shape).transpose(1, 2) for shape in shapes) for key, shapes in own.before
    }
    kwargs = {**kwargs, own.argument: state}
    hidden = _unfold(hidden_BTD, own)
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, _HIDDEN: hidden})


def _lay_beside(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The hook after a call."""
    own: Carried = vars(block)["carried"]
    if type(state := kwargs[own.argument]) is not dict:
        return output
    hidden_BTD = fold(output if isinstance(output, Tensor) else output[0])
    parts = [tensor.transpose(1, 2).flatten(2) for key, _ in own.after for tensor in state[key]]
    hidden_BTW = torch.cat([hidden_BTD, *(part.to(hidden_BTD.dtype) for part in parts)], dim=-1)
    return hidden_BTW if isinstance(output, Tensor) else (hidden_BTW, *output[1:])
