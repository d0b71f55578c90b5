"""Blocks that are too large for one device: which of their modules compute where, and the moves between them."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoround import func
from autoround.backends.base import Backend
from autoround.errors import ModelError
from autoround.layers import LayerSetting, assign
from autoround.log import LOGGER
from autoround.plan import BlockPlan
from autoround.recipe import Recipe

# Of a device's memory, what weights and all that is tuned with them may take; rows and what they become take the rest.
# An estimate: how much that is depends on the block.
WEIGHTS_SHARE = 0.7
# Bytes for each weight of a block while it is quantized, and what some settings add to them. Counted by
# tests/engine/test_placement.py while the tuner runs on tensors without data.
WEIGHT_BYTES = 28
MORE_BYTES: Mapping[str, int] = {"best": 8, "momentum": 8, "adam": 17}
# What no step does without: the weight and its offset before and after in float32, and in the compute dtype the rounded
# weight and its gradient.
LEAST_BYTES = 16


@dataclass(frozen=True, eq=False, slots=True)
class SpreadFn(func.BlockFn):
    """A block whose modules compute on several devices; it is called with tensors on the first of them.

    Attributes:
        places: module path -> device of the module and of what is below it; "" is the block itself.
    """

    places: dict[str, torch.device]

    def sent(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each tensor of the block where it computes."""
        return {name: tensor.to(_device(self.places, name)) for name, tensor in tensors.items()}


def fitted(block_fn: func.BlockFn, recipe: Recipe, backend: Backend, devices: Sequence[torch.device]) -> func.BlockFn:
    """The block itself where the first device has room to tune it, or its memory is not known; else spread over all.

    Args:
        block_fn: the lifted block.
        recipe: the settings.
        backend: of the devices.
        devices: where the block may compute; the first one is given its inputs.
    """
    sizes = [backend.device_bytes(device) for device in devices]
    known = [size for size in sizes if size is not None]
    if len(known) < 2 or len(known) < len(sizes):
        return block_fn
    places = place(block_fn.skeleton, [int(WEIGHTS_SHARE * size) // weight_bytes(recipe) for size in known])
    return spread(block_fn, {path: devices[index] for path, index in places.items()}) if len(places) > 1 else block_fn


def as_named(block_fn: func.BlockFn, path: str, named: Mapping[str, torch.device], home: torch.device) -> SpreadFn:
    """The block with its modules where a map says.

    Args:
        block_fn: the lifted block.
        path: of the block.
        named: from ``find_named``.
        home: where the rest computes.
    """
    own = {name: named[full] for name, _ in block_fn.skeleton.named_modules()
           if (full := f"{path}.{name}".rstrip(".")) in named}  # fmt: skip
    places = {"": home, **own}
    apart = {name: device for name, device in own.items()
             if name and device != _device(places, name.rpartition(".")[0])}  # fmt: skip
    return spread(block_fn, {"": places[""], **apart})


def find_named(named: Mapping[str, torch.device], model: nn.Module, blocks: Sequence[str]) -> dict[str, torch.device]:
    """Module path -> device, of all modules in blocks that a map names.

    Args:
        named: path or pattern -> device, the later ones winning, whole paths over patterns.
        model: the model, with or without data.
        blocks: paths of its blocks.

    Raises:
        UsageError: a pattern names no module of a block.

    >>> model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.ReLU()))
    >>> find_named({r"1$": torch.device("cpu")}, model, ["0"])
    {'0.1': device(type='cpu')}
    """
    paths = [
        f"{block}.{name}".rstrip(".") for block in blocks for name, _ in model.get_submodule(block).named_modules()
    ]
    settings = [LayerSetting(pattern=pattern, changes=(("device", device),), flag="device_map")
                for pattern, device in named.items() if pattern]  # fmt: skip
    return {path: dict(setting.changes)["device"] for path, setting in assign(settings, paths).items()}


def check_room(recipe: Recipe, blocks: Sequence[BlockPlan], rooms: Mapping[str, int]) -> None:
    """Refuse steps for which the memory cannot suffice, whatever else is changed.

    Args:
        recipe: the settings.
        blocks: to be tuned.
        rooms: free bytes by what sets the bound; none where that is not known.

    Raises:
        ModelError: a block is too large.
    """
    where, room = min(rooms.items(), key=lambda each: each[1], default=("", None))
    for block in blocks if recipe.iters and room is not None else ():
        if block.weights * LEAST_BYTES > room:
            raise ModelError(
                f"{block.path}: found {room / 1e6:,.1f} MB that {where} leaves free; needed at least "
                f"{block.weights * LEAST_BYTES / 1e6:,.1f} MB to tune its {block.weights:,} weights, beside all rows; "
                "give it more, or use --iters 0; auto-round plan counts all that a run needs"
            )


def weight_bytes(recipe: Recipe) -> int:
    """Bytes that a block takes for each weight while it is quantized, its rows apart."""
    family = MORE_BYTES["adam"] if recipe.adam else MORE_BYTES["momentum"] if recipe.momentum else 0
    return WEIGHT_BYTES + family + (MORE_BYTES["best"] if recipe.keep == "best" else 0)


def place(block: nn.Module, rooms: Sequence[int]) -> dict[str, int]:
    """Choose a device for each module, the largest first, as much of a module together as one device has room for.

    A module that no device has room for and that has no parts goes where most room is.

    Args:
        block: its tensors may be on the meta device.
        rooms: how many weights each device has room for.

    Returns:
        Module path -> index of its device, for modules whose device is not that of the module around them; "" -> 0, the
        block itself, alone where the first device has room for all of it.

    >>> block = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU()))
    >>> place(block, [48, 48]), place(block, [40, 20])
    ({'': 0}, {'': 0, '1': 0, '0': 1})
    """
    from accelerate.utils import compute_module_sizes

    sizes = compute_module_sizes(block, dtype=torch.int8)  # a byte for each weight
    if sizes[""] <= rooms[0]:
        return {"": 0}
    free, places, waiting = list(rooms), {"": 0}, {"": block}
    while waiting:
        path = max(waiting, key=lambda own: sizes[own])
        module, target = waiting.pop(path), max(range(len(free)), key=lambda index: free[index])
        parts = {f"{path}.{name}".lstrip("."): part for name, part in module.named_children()}
        if path and not _is_container(module) and (sizes[path] <= free[target] or not parts):
            places[path] = target
            free[target] -= sizes[path]
        else:
            waiting |= {own: part for own, part in parts.items() if sizes[own]}
            free[0] -= sizes[path] - sum(sizes[own] for own in parts)
    return places


def spread(block_fn: func.BlockFn, places: Mapping[str, torch.device]) -> SpreadFn:
    """A block of which some modules compute elsewhere: their inputs are sent there, and their outputs back.

    Args:
        block_fn: the lifted block.
        places: module path -> device of the module and of what is below it, unless that is named too; "" is the block.

    >>> block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> block_fn = spread(func.make_block_fn(block), {"": torch.device("cpu"), "0": torch.device("cpu", 0)})
    >>> x = torch.ones(1, 2, 4)
    >>> torch.equal(block_fn(block_fn.sent(block.state_dict()), func.Call((x,), {})), block(x))
    True
    """
    skeleton, own = copy.deepcopy(block_fn.skeleton), dict(places)
    for path, module in skeleton.named_modules():
        if path in own and _is_container(module):  # nobody calls it
            device = own.pop(path)
            own = {f"{path}.{name}": device for name, _ in module.named_children()} | own
    for path in own.keys() - {""}:
        module = skeleton.get_submodule(path)
        module.register_forward_pre_hook(partial(_enter, own[path]), with_kwargs=True)
        module.register_forward_hook(partial(_leave, _device(own, path.rpartition(".")[0])))
    names = ",".join(f"{path}={device}" for path, device in sorted(own.items()))
    LOGGER.info("a block is spread over devices: %s", names)
    return SpreadFn(skeleton, f"{block_fn.signature}@{names}", block_fn.transposed, block_fn.stacks, own)


def sharers(block_fn: func.BlockFn, devices: Sequence[torch.device]) -> Sequence[torch.device]:
    """The devices that share the rows of a block: all of them, or the first one of those that it is spread over."""
    return (block_fn.places[""],) if isinstance(block_fn, SpreadFn) else devices


def _device(places: Mapping[str, torch.device], name: str) -> torch.device:
    """Where a module or tensor is: as the innermost named module around it."""
    while name not in places:
        name = name.rpartition(".")[0]
    return places[name]


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def _enter(device: torch.device, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    from accelerate.utils import send_to_device

    del module  # the hook's signature
    return send_to_device(args, device), send_to_device(kwargs, device)


def _leave(device: torch.device, module: nn.Module, args: Any, output: Any) -> Any:
    from accelerate.utils import send_to_device

    del module, args  # the hook's signature
    return send_to_device(output, device)
