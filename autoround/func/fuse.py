"""Layers stored alike as one weight: rounding knows groups only, so the groups of all layers can share a tensor.

A block of seven layers then has one kernel for rounding, its gradient and the update instead of seven of each.

Legend: O output features, I input features, G groups in a row, S columns in a group, B groups stored together (1 on
integer grids, those of a block in GGUF types), N such blocks of all layers together.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from autoround.func.types import BlockFunction, Call, Prepared, RoundingParams
from autoround.spec import WeightSpec

Leaves = TypeVar("Leaves", Prepared, RoundingParams)


@dataclass(frozen=True, eq=False, slots=True)
class Fusion:
    """Which layers share a tensor.

    Attributes:
        shapes: layer path -> (O, G, S), in the order in which the layers' groups lie in the shared tensors.
        members: name of a shared tensor -> paths of its layers.
        specs: name of a shared tensor -> spec of them all.
    """

    shapes: dict[str, tuple[int, int, int]]
    members: dict[str, tuple[str, ...]]
    specs: dict[str, WeightSpec]

    def merge(self, tree: Mapping[str, Leaves]) -> dict[str, Leaves]:
        """Lay the blocks of layers one below the other: (O, G, …) of each -> (N, B, …) of all."""
        merged = {}
        for name, paths in self.members.items():
            groups = self.specs[name].block_groups
            fields = zip(*(tree[path] for path in paths), strict=True)
            merged[name] = type(tree[paths[0]])(*(_concatenate(leaves, groups) for leaves in fields))
        return merged

    def split(self, fused: Mapping[str, Leaves]) -> dict[str, Leaves]:
        """Undo ``merge``, in the layers' own order; the results are views."""
        parts: dict[str, Leaves] = {}
        for name, paths in self.members.items():
            fields = [torch.split(leaf, self._sizes(name)) for leaf in fused[name]]
            for path, own in zip(paths, zip(*fields, strict=True), strict=True):
                rows, groups, _ = self.shapes[path]
                parts[path] = type(fused[name])(*(leaf.view(rows, groups, *leaf.shape[2:]) for leaf in own))
        return {path: parts[path] for path in self.shapes}

    def lift(self, block_fn: BlockFunction) -> BlockFunction:
        """The same block as a function of the shared weights (N, B * S)."""

        def fused_fn(tensors: Mapping[str, Tensor], call: Call) -> Tensor:
            own = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in self.members}
            for name, paths in self.members.items():
                weights = torch.split(tensors[f"{name}.weight"], self._sizes(name))
                for path, weight in zip(paths, weights, strict=True):
                    own[f"{path}.weight"] = weight.view(self.shapes[path][0], -1)
            return block_fn(own, call)

        return fused_fn

    def _sizes(self, name: str) -> list[int]:
        groups = self.specs[name].block_groups
        return [self.shapes[path][0] * self.shapes[path][1] // groups for path in self.members[name]]


def fuse(tuned: Mapping[str, Prepared], specs: Mapping[str, WeightSpec]) -> Fusion:
    """Find the layers that can share a tensor: those of equal spec and equal columns in a group, on one device.

    Args:
        tuned: layer path -> prepared weight.
        specs: layer path -> how its weight is stored.

    >>> from autoround.func.rounding import prepare
    >>> from autoround.spec import QuantSpec
    >>> specs = dict.fromkeys(("up", "down"), QuantSpec(bits=4, group_size=2))
    >>> tuned = {"up": prepare(torch.ones(3, 4), specs["up"]), "down": prepare(torch.ones(1, 2), specs["down"])}
    >>> fusion = fuse(tuned, specs)
    >>> {name: weight.weight_OGS.shape for name, weight in fusion.merge(tuned).items()}
    {'0: W4A16G2': torch.Size([7, 1, 2])}
    >>> fusion.split(fusion.merge(tuned))["up"].weight_OGS.shape
    torch.Size([3, 2, 2])
    """
    alike: dict[tuple[WeightSpec, int, torch.device], list[str]] = defaultdict(list)
    for path, prepared in tuned.items():
        alike[specs[path], prepared.weight_OGS.shape[-1], prepared.weight_OGS.device].append(path)
    shapes = {path: tuple(prepared.weight_OGS.shape) for path, prepared in tuned.items()}
    names = [f"{index}: {spec}" for index, (spec, *_) in enumerate(alike)]
    return Fusion(
        shapes=shapes,  # type: ignore[arg-type]  # three dimensions each
        members=dict(zip(names, map(tuple, alike.values()), strict=True)),
        specs=dict(zip(names, (spec for spec, *_ in alike), strict=True)),
    )


def _concatenate(leaves: tuple[Tensor, ...], groups: int) -> Tensor:
    return torch.cat([leaf.reshape(-1, groups, *leaf.shape[2:]) for leaf in leaves])
