"""What a written checkpoint holds: which tensors are kept, which are replaced by codes, and under what names."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from autoround.errors import FormatError
from autoround.formats.types import Format
from autoround.func.types import IntCodes
from autoround.plan import Plan
from autoround.spec import QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Number of a part of the plan, a block as a rule -> layer path relative to it -> codes.
BlockCodes: TypeAlias = Callable[[int], Mapping[str, IntCodes]]


class Source(Protocol):
    """Tensors of a model by module name."""

    def names(self) -> tuple[str, ...]: ...

    def checkpoint_name(self, name: str) -> str: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> Tensor: ...


class Model(Protocol):
    """What is needed of an opened model; ``autoround.model.load.OpenModel`` is one."""

    @property
    def name(self) -> str: ...

    @property
    def skeleton(self) -> "PreTrainedModel": ...

    @property
    def config(self) -> Any: ...

    @property
    def source(self) -> Source: ...

    @property
    def folder(self) -> Path | None: ...

    @property
    def gguf_file(self) -> str | None: ...

    @property
    def own_tokenizer(self) -> Any: ...

    def tokenizer(self) -> "PreTrainedTokenizerBase": ...

    def side_files(self) -> tuple[Path, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Everything that decides what is in the files.

    Attributes:
        model: where the unquantized tensors, the configuration and the side files come from.
        plan: which layers are quantized, and how.
        codes: number of a part of the plan -> codes of its layers.
        form: the layout.
        dtype: "float16", …: of the unquantized weights where the layout demands none; their own when None.
    """

    model: Model
    plan: Plan
    codes: BlockCodes
    form: Format
    dtype: str | None = None

    @property
    def target(self) -> torch.dtype | None:
        """To what unquantized tensors are cast, if to anything."""
        name = self.form.dtype or self.dtype
        return None if name is None else getattr(torch, name)

    def kept(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint name and value of every tensor that is not replaced; of weights tied to each other one is enough.

        Raises:
            FormatError: a finite value is beyond the range of its dtype.
        """
        names = self.model.source.names()
        skeleton = self.model.skeleton
        first = {id(parameter): name for name, parameter in skeleton.named_parameters()}
        twins = {name: first[id(parameter)] for name, parameter in skeleton.named_parameters(remove_duplicate=False)}
        left_out = {f"{path}.weight" for path in self.plan.specs}
        left_out.update(name for name in names if (twin := twins.get(name, name)) != name and twin in names)
        for name in names:
            if name not in left_out:
                yield self.model.source.checkpoint_name(name), cast(self.model.source.read(name), self.target, name)
        for name in (f"{owner}.weight" for owner in self.untied.values()):
            if name not in names:  # the checkpoint has the shared weight under the name of the quantized layer
                yield name, cast(self.model.source.read(name), self.target, name)

    def layers(self) -> Iterator[tuple[str, QuantSpec, IntCodes]]:
        """Path, spec and codes of every quantized layer; one block's codes are read at a time."""
        for index, part in enumerate(self.plan.parts):
            codes = self.codes(index)
            for relative, spec in part.specs.items():
                yield f"{part.prefix}{relative}", spec, codes[relative]

    @property
    def untied(self) -> dict[str, str]:
        """Quantized layers that shared a weight -> the module that keeps it."""
        return {
            layer.shape.path: layer.shape.tied_to for layer in self.plan.outside if layer.spec and layer.shape.tied_to
        }

    def prefix(self, path: str) -> str:
        """What the names of a quantized layer's tensors begin with."""
        if path in self.untied:  # a checkpoint names the shared weight once, and not always by this layer
            return f"{path}."
        return self.model.source.checkpoint_name(f"{path}.weight").removesuffix("weight")

    def weight_dtype(self, path: str) -> torch.dtype:
        """Dtype of a layer's weight where the layout stores one."""
        return self.target or self.model.source.dtype(f"{path}.weight")

    def is_transposed(self, path: str) -> bool:
        """Whether a layer's module stores its weight as (I, O), as GPT-2's Conv1D does."""
        return not isinstance(self.model.skeleton.get_submodule(path), nn.Linear | nn.Embedding)

    def expected_bytes(self) -> int:
        """About how much space the weights will take."""
        packed = self.form.config(self.plan) is not None
        source, layers, specs, total = self.model.source, self.plan.layers, self.plan.specs, 0.0
        for name in source.names():
            if name.removesuffix(".weight") not in specs:
                stored = source.dtype(name)
                cast_to = self.target if self.target is not None and stored.is_floating_point else stored
                total += math.prod(source.shape(name)) * cast_to.itemsize
        for path, spec in specs.items():
            shape = layers[path].shape
            width = float(self.weight_dtype(path).itemsize)
            if packed:
                width = spec.bits / 8 + (spec.bits / 8 + 4) / spec.group_of(shape.in_features)
            total += shape.out_features * shape.in_features * width
        return int(total)


def cast(tensor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    """Cast a floating-point tensor; others, and all where no dtype is given, stay as they are.

    Raises:
        FormatError: a finite value is beyond the dtype's range.
    """
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    ends = torch.stack(result.aminmax()) if result.numel() else result  # which needs no memory of its own
    if not bool(torch.isfinite(ends).all()) and bool((torch.isinf(result) & torch.isfinite(tensor)).any()):
        largest = tensor[torch.isfinite(tensor)].abs().max().item()
        raise FormatError(
            f"{name}: found values up to {largest:g}; needed at most {torch.finfo(dtype).max:g} for {dtype}; "
            "use the format auto_round, or another --model_dtype"
        )
    return result
