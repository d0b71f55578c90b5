"""How configurations name layers: plain ones by their paths, stacks of experts by their matrices in the files."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

from autoround.plan import LayerShape, Plan

Fate = TypeVar("Fate")


class Name(NamedTuple):
    """Of layers that share a fate.

    Attributes:
        path: of a layer, or of a module of experts all of which are meant; empty where only some of its stacks are.
        pattern: matches the whole names of the layers that are meant, of such a module too, and no others.
    """

    path: str
    pattern: str

    @property
    def exact(self) -> bool:
        """Whether it is one layer's, which the path names as well."""
        return self.pattern == re.escape(self.path)


def named(fates: Iterable[tuple[LayerShape, Fate]]) -> Iterator[tuple[Name, Fate]]:
    """Names of layers with their fates; the stacks of a module of experts have one name where they share a fate.

    Loaders ask for an expert's layer (compressed-tensors, GPTQModel) or for the whole module (vLLM).

    Args:
        fates: all layers of a plan; of one that leaves out a stack, its module would be taken for whole.

    >>> paths = "mlp.experts.up", "mlp.experts.down"
    >>> stacks = [LayerShape(path=path, out_features=16, in_features=8, experts=2) for path in paths]
    >>> [tuple(name) for name, _ in named([(stack, "kept") for stack in stacks])]
    [('mlp.experts', 'mlp\\\\.experts(\\\\.\\\\d+\\\\.(up|down))?')]
    >>> [name.pattern for name, _ in named(zip(stacks, ("kept", "packed")))]
    ['mlp\\\\.experts\\\\.\\\\d+\\\\.(up)', 'mlp\\\\.experts\\\\.\\\\d+\\\\.(down)']
    """
    modules: dict[str, list[tuple[tuple[str, ...], Fate]]] = {}
    for shape, fate in fates:
        if shape.experts:
            module, parts = _split(shape)
            modules.setdefault(module, []).append((parts, fate))
        else:
            yield Name(shape.path, re.escape(shape.path)), fate
    for module, stacks in modules.items():
        first = stacks[0][1]
        if all(fate == first for _, fate in stacks):
            tail = _numbered(part for parts, _ in stacks for part in parts)
            yield Name(module, f"{re.escape(module)}({tail})?"), first
        else:
            yield from ((Name("", re.escape(module) + _numbered(parts)), fate) for parts, fate in stacks)


def absent(plan: Plan) -> list[Name]:
    """Names of modules that only the checkpoint has, such as heads that predict further tokens, with all below them.

    They are not quantized, but loaders that know them would take their layers for such as are.
    """
    return [Name(path, rf"{re.escape(path)}(\..+)?") for path in plan.absent]


def _split(shape: LayerShape) -> tuple[str, tuple[str, ...]]:
    """What the names of a stack's matrices begin with, before the number of the expert, and what comes after it."""
    first = [name.removesuffix(".weight").split(".") for name in shape.pieces[0]]
    last = shape.pieces[-1][0].removesuffix(".weight").split(".")
    place = max(index for index, (one, two) in enumerate(zip(first[0], last, strict=True))
                if one != two or (shape.experts == 1 and one == "0"))  # fmt: skip
    return ".".join(first[0][:place]), tuple(".".join(words[place + 1 :]) for words in first)


def _numbered(parts: Iterable[str]) -> str:
    return rf"\.\d+\.({'|'.join(map(re.escape, parts))})"
