"""A model in which recorders stand in for the blocks, and whose other weights are read when they are first used.

What a model adds to hidden states between blocks, as Qwen3-VL does with image features, is recorded as one more
argument of the block that follows.
"""

import contextlib
import copy
from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path
from transformers import PreTrainedModel

from autoround.errors import ModelError
from autoround.model.calls import Fresh, Hidden, Seen
from autoround.model.load import OpenModel
from autoround.model.skeleton import sees_images
from autoround.model.source import WeightSource
from autoround.precision import Dtypes, held_dtypes

_HIDDEN = "hidden_states"
# The longest tuple that models unpack what their blocks return into.
_MOST_ITEMS = 4
_NOTHING: Mapping[str, Tensor] = MappingProxyType({})
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


class BlindError(ModelError):
    """Some blocks are called for rows with images alone, and there are none."""


class RecordingModel:
    """Runs forwards without blocks and returns how the blocks were called.

    Args:
        model: an opened model; it is not changed.
        blocks: paths of all blocks in call order.
        device: where forwards run.
        dtype: floating-point dtype in which they run, but for what transformers keeps in float32.
    """

    def __init__(self, model: OpenModel, blocks: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        skeleton, self._blocks, self._device, self._dtype = model.skeleton, list(blocks), device, dtype
        self._seen: list[Seen] = []
        self._flow = _Flow()
        self._recorders = [_Recorder(path, skeleton.get_submodule(path), self._seen, self._flow) for path in blocks]
        self._recorders[-1].is_last = True
        memo: dict[int, object] = {id(recorder.block[0]): recorder for recorder in self._recorders}
        memo.update({id(buffer): buffer.to(device) for buffer in skeleton.buffers()})
        dtypes = held_dtypes(skeleton, dtype)
        for name, parameter in skeleton.named_parameters():
            meta = parameter.to(dtypes(name)) if parameter.is_floating_point() else parameter
            memo[id(parameter)] = nn.Parameter(meta, requires_grad=False)
        self._model: PreTrainedModel = copy.deepcopy(skeleton, memo)
        for path, module in self._model.named_modules():
            load = partial(_load, source=model.source, path=path, device=device, dtypes=dtypes)
            module.register_forward_pre_hook(load)

    def __call__(
        self, tokens_BT: Tensor, valid_BT: Tensor | None, *, shift: float, media: Mapping[str, Tensor] = _NOTHING
    ) -> list[Seen]:
        """Run a forward up to the last block.

        Args:
            tokens_BT: int64 token ids.
            valid_BT: bool, False for padding tokens; None gives the model no mask.
            shift: added to the hidden states that blocks return.
            media: other arguments of the model.

        Returns:
            The call of every block.

        Raises:
            ModelError: blocks are not called once each in the order given, or not with hidden states (B, T, D) or
                several streams of them, (S, B, T, D).
        """
        for recorder in self._recorders:
            recorder.shift = shift
        mask = None if valid_BT is None else valid_BT.long().to(self._device)
        own = {name: tensor.to(self._device, self._dtype if tensor.is_floating_point() else tensor.dtype)
               for name, tensor in media.items()}  # fmt: skip
        calls = self._run({"input_ids": tokens_BT.to(self._device), "attention_mask": mask, **own})
        called = [call.block for call in calls]
        if called != self._blocks:
            self._refuse_blindness(called, media)
            raise ModelError(
                f"{type(self._model).__name__}: found calls of {', '.join(called[:4]) or 'no block'}, …; needed "
                f"{self._blocks[0]} … {self._blocks[-1]} once each in this order; this model is not supported yet"
            )
        for call in calls:
            shape = tuple(call.hidden.shape)
            if len(shape) < 3 or shape[-3:-1] != tokens_BT.shape:
                raise ModelError(f"{call.block}: found hidden states of shape {shape}; needed (batch, tokens, size)")
        return calls

    def part_additions(self) -> None:
        """From now on, record what the model adds between blocks as an argument, which comes last."""
        self._flow.forgets = True

    @property
    def items(self) -> int:
        """How many items the model unpacks what a block returns into; 0 where that is the hidden states alone."""
        return self._recorders[0].items

    def set_items(self, items: int) -> None:
        """Let recorders return so many items."""
        for recorder in self._recorders:
            recorder.items = items

    def _refuse_blindness(self, called: Sequence[str], media: Mapping[str, Tensor]) -> None:
        left_out = [block for block in self._blocks if block not in called]
        if left_out and not media and sees_images(self._model.config):
            raise BlindError(
                f"{left_out[0]}: found no call of this block for text alone; needed rows with images, which it attends "
                "to; give a --dataset of messages with images"
            )

    def _run(self, arguments: Mapping[str, Any]) -> list[Seen]:
        """The calls of a forward, with as many items from each block as the model takes."""
        for items in range(self.items, _MOST_ITEMS + 1):
            self.set_items(items)
            try:
                calls = self._run_once(arguments)
            except ModelError:
                raise
            except ValueError:  # from unpacking, unless no number of items helps
                if items == _MOST_ITEMS:
                    raise
            else:
                if len(calls) < 2 or calls[1].hidden.ndim == calls[0].hidden.ndim:  # else it took part of a tensor
                    break
        return calls

    def _run_once(self, arguments: Mapping[str, Any]) -> list[Seen]:
        self._seen.clear()
        self._flow.hidden = None
        with contextlib.suppress(_Stop), torch.no_grad():
            self._model(**arguments, use_cache=False)
        return list(self._seen)


class _Stop(Exception):
    """Ends a forward at the last block."""


class _Flow:
    """The hidden states that the last recorder returned, zeros where it forgets its own."""

    hidden: Tensor | None = None
    forgets = False

    def reaches(self, hidden: Tensor) -> bool:
        """Whether these are the same ones, or there are none yet."""
        before = self.hidden
        if before is None or before is hidden:
            return True
        return before.shape == hidden.shape and torch.equal(before.to(hidden.dtype), hidden)


class _Recorder(nn.Module):
    """Stands in for a block: notes its arguments and hands its hidden states on."""

    def __init__(self, path: str, block: nn.Module, seen: list[Seen], flow: _Flow) -> None:
        super().__init__()
        self.path, self.seen, self.flow = path, seen, flow
        self.block = (block,)  # in a tuple, so that it is no submodule
        self.shift, self.is_last, self.items = 0.0, False, 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        hidden = args[0] if args else kwargs.get(_HIDDEN)
        if not isinstance(hidden, Tensor):
            raise ModelError(f"{self.path}: found a call without hidden states; needed them first or as {_HIDDEN}=")
        own: tuple[Any, ...] = ((Hidden(), *args[1:]), kwargs) if args else ((), {**kwargs, _HIDDEN: Hidden()})
        if self.flow.forgets and self.flow.hidden is not None:
            own = (*own, hidden - self.shift)
        flat, spec = tree_flatten_with_path(own)
        names, leaves = tuple(keystr(path) for path, _ in flat), tuple(_fresh(leaf) for _, leaf in flat)
        for name, leaf in zip(names, leaves, strict=True):
            if not isinstance(leaf, (Tensor, Hidden, Fresh, *_CONSTANTS)):
                raise ModelError(
                    f"{self.path}: found argument {name} of type {type(leaf).__name__}; needed tensors, numbers, texts "
                    "or None; this model is not supported yet"
                )
        self.seen.append(Seen(self.path, hidden, names, leaves, spec, self.flow.reaches(hidden)))
        if self.is_last:
            raise _Stop
        hidden = torch.zeros_like(hidden) if self.flow.forgets else hidden
        self.flow.hidden = hidden = hidden + self.shift if self.shift else hidden
        return (hidden, *[None] * (self.items - 1)) if self.items else hidden

    def __getattr__(self, name: str) -> Any:
        """What the model reads off its blocks, such as ``attention_type``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block[0], name)


def _fresh(leaf: Any) -> Any:
    """An empty mapping that blocks may fill, as one that every call is given anew."""
    return Fresh() if isinstance(leaf, MutableMapping) and not leaf else leaf


def _load(
    module: nn.Module, args: object, *, source: WeightSource, path: str, device: torch.device, dtypes: Dtypes
) -> None:
    """Replace a module's own meta parameters by the stored ones, and that by which a model tells its device.

    A tower is read whole, since some read the weights of their layers themselves, and so is what is built around one,
    which may ask a layer for its device.
    """
    del args
    models = any(isinstance(each, PreTrainedModel) for each in (module, *module.children()))
    is_tower = models and not any(isinstance(each, _Recorder) for each in module.modules())
    own = dict(module.named_parameters(recurse=is_tower))
    if isinstance(module, PreTrainedModel):
        own.update([next(module.named_parameters())])
    for name, parameter in own.items():
        if parameter.is_meta:
            full = f"{path}.{name}" if path else name
            tensor = source.read(full)
            tensor = tensor.to(device, dtypes(full) if tensor.is_floating_point() else tensor.dtype)
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))
