"""What a written checkpoint holds: which tensors are kept, which are replaced by codes, and under what names."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from autoround.errors import FormatError
from autoround.formats.types import Format
from autoround.func.block import transposed_weights
from autoround.func.rounding import dequantize
from autoround.func.types import IntCodes
from autoround.plan import LayerPlan, LayerShape, Plan
from autoround.precision import Dtypes, held_dtypes
from autoround.spec import GgufSpec, QuantSpec, WeightSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Number of a part of the plan, a block as a rule -> layer path relative to it -> codes.
BlockCodes: TypeAlias = Callable[[int], Mapping[str, IntCodes]]

# Elements of a tensor that are cast or compared at once.
PIECE = 2**18


class Source(Protocol):
    """Tensors of a model by module name."""

    def names(self) -> tuple[str, ...]: ...

    def extra(self) -> tuple[str, ...]: ...

    def checkpoint_name(self, name: str) -> str: ...

    def pieces(self, name: str) -> tuple[tuple[str, ...], ...]: ...

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


@dataclass(frozen=True, kw_only=True)
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

    def heads(self) -> Iterator[tuple[str, Tensor]]:
        """Name, shape and dtype in the files (on the meta device) of each of ``tensors``, in their order."""
        source, layers, alike = self.model.source, self.plan.layers, {}
        extra, skeleton = frozenset(source.extra()), self.model.skeleton
        for origin, stored in self._kept_names():
            own = source.dtype(origin)
            whole = skeleton.get_parameter(origin).shape if origin in self._whole else source.shape(origin)
            cast = own.is_floating_point and origin not in extra and self._dtypes(origin) == self.target
            dtype = (self.target or own) if cast else own
            for name, rows in stored:
                yield name, _head(whole if rows is None else (rows.stop - rows.start, whole[-1]), dtype)
        for part in self.plan.parts:
            for relative, spec in part.specs.items():
                shape = layers[f"{part.prefix}{relative}"].shape
                for path, _ in () if shape.parameter in self._whole else self._matrices(shape):
                    key = spec, (shape.rows, shape.in_features), self.weight_dtype(path)
                    if key not in alike:
                        alike[key] = self._blank(path, *key)
                    yield from self._named(path, alike[key])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint name and value, not yet in the dtype of the files, of everything that is written, one by one.

        Raises:
            FormatError: the layout cannot hold the codes of a layer.
        """
        yield from self.kept()
        for path, spec, codes in self.layers():
            yield from self._named(path, self._packed(path, codes, spec))

    def kept(self) -> Iterator[tuple[str, Tensor]]:
        """Those of them that are not made of codes; of weights tied to each other one is enough."""
        for origin, stored in self._kept_names():
            tensor = self._rounded(origin) if origin in self._whole else self.model.source.read(origin)
            for name, rows in stored:
                yield name, tensor if rows is None else tensor.flatten(0, 1)[rows]

    def layers(self) -> Iterator[tuple[str, Any, IntCodes]]:
        """Path, spec and codes of every quantized layer; one block's codes are read at a time.

        Of a stack of experts each matrix is a layer, whose path is that of its name in the checkpoint.
        """
        layers = self.plan.layers
        for index, part in enumerate(self.plan.parts):
            codes = self.codes(index)
            for relative, spec in part.specs.items():
                shape = layers[f"{part.prefix}{relative}"].shape
                for path, rows in () if shape.parameter in self._whole else self._matrices(shape):
                    own = codes[relative]
                    yield path, spec, own if rows is None else type(own)(*(field[rows] for field in own))

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """What configurations say of the layout, with names as they are in the files."""
        return self.form.config(self._named_plan)

    @property
    def untied(self) -> dict[str, str]:
        """Quantized layers that shared a weight -> the module that keeps it."""
        return {
            layer.shape.path: layer.shape.tied_to for layer in self.plan.outside if layer.spec and layer.shape.tied_to
        }

    def prefix(self, path: str) -> str:
        """What the names of a quantized layer's tensors begin with."""
        if (
            path in self._stacks or path in self.untied
        ):  # a checkpoint names the shared weight once, and not always by this layer
            return f"{path}."
        return self.model.source.checkpoint_name(f"{path}.weight").removesuffix("weight")

    def weight_dtype(self, path: str) -> torch.dtype:
        """Dtype of a layer's weight where the layout stores one."""
        return self.target or self.model.source.dtype(self._stacks.get(path, f"{path}.weight"))

    def is_transposed(self, path: str) -> bool:
        """Whether a layer's module stores its weight as (I, O), as GPT-2's Conv1D does."""
        if path in self._stacks:
            return False
        return not isinstance(self.model.skeleton.get_submodule(path), nn.Linear | nn.Embedding)

    @cached_property
    def _dtypes(self) -> Dtypes:
        """In what transformers would hold unquantized tensors."""
        return held_dtypes(self.model.skeleton, self.target or torch.float32)

    @property
    def _named_plan(self) -> Plan:
        """The plan, whose stacks of experts know the names of their matrices, and what the model does not have."""

        def named(layer: LayerPlan) -> LayerPlan:
            shape = layer.shape
            return replace(layer, shape=replace(shape, stored=self._pieces(shape))) if shape.experts else layer

        blocks = (replace(block, layers=tuple(map(named, block.layers))) for block in self.plan.blocks)
        return replace(self.plan, blocks=tuple(blocks), absent=self._absent)

    @property
    def _absent(self) -> tuple[str, ...]:
        """Paths of the modules of extra tensors, as far up as the model does not have them."""
        skeleton = self.model.skeleton
        modules = {name for name, _ in skeleton.named_modules()}
        modules |= {name.removeprefix(f"{skeleton.base_model_prefix}.") for name in modules}
        paths = (itertools.accumulate(name.split(".")[:-1], "{}.{}".format) for name in self.model.source.extra())
        return tuple(dict.fromkeys(next(path for path in own if path not in modules) for own in paths))

    @cached_property
    def _stacks(self) -> dict[str, str]:
        """Path of each matrix of a quantized stack of experts -> name of the parameter."""
        shapes = [layer.shape for layer in self.plan.layers.values() if layer.spec and layer.shape.experts]
        return {path: shape.parameter for shape in shapes for path, _ in self._matrices(shape)}

    @cached_property
    def _whole(self) -> dict[str, tuple[int, str]]:
        """Stacks that an ordinary checkpoint holds in one tensor: parameter -> number of its part, path in that."""
        if self.config is not None:
            return {}
        return {
            layer.shape.parameter: (index, layer.shape.path.removeprefix(part.prefix))
            for index, part in enumerate(self.plan.parts)
            for layer in part.layers
            if layer.spec is not None and layer.shape.whole
        }

    def _rounded(self, parameter: str) -> Tensor:
        """What the codes of such a stack stand for, as its module has it."""
        index, relative = self._whole[parameter]
        weight_OI = dequantize(self.codes(index)[relative], self.plan.specs[parameter])
        weight_EOI = weight_OI.unflatten(0, (self.plan.layers[parameter].shape.experts, -1))
        return weight_EOI.mT if f"{parameter}.weight" in transposed_weights(self.model.skeleton) else weight_EOI

    def _matrices(self, shape: LayerShape) -> Iterator[tuple[str, slice | None]]:
        """The layers as which a layer is stored: itself, or path and rows of each matrix of a stack."""
        if not shape.experts:
            yield shape.path, None
            return
        for name, rows in _placed(self._pieces(shape), shape.out_features):
            yield name.removesuffix(".weight"), rows

    def _pieces(self, shape: LayerShape) -> tuple[tuple[str, ...], ...]:
        """Names of the matrices of a stack, expert by expert."""
        return self.model.source.pieces(shape.parameter) or shape.pieces

    def _kept_names(self) -> Iterator[tuple[str, list[tuple[str, slice | None]]]]:
        """Module name of every tensor that is not replaced, with its name in the checkpoint, or names and rows of the
        matrices of a stack."""
        names, skeleton = self.model.source.names(), self.model.skeleton
        first = {id(parameter): name for name, parameter in skeleton.named_parameters()}
        twins = {name: first[id(parameter)] for name, parameter in skeleton.named_parameters(remove_duplicate=False)}
        left_out = {layer.shape.parameter for layer in self.plan.layers.values() if layer.spec is not None}
        left_out.update(name for name in names if (twin := twins.get(name, name)) != name and twin in names)
        for name in names:
            if name in left_out or name in self._whole:
                continue
            if pieces := self.model.source.pieces(name):
                experts, rows, _ = self.model.source.shape(name)
                yield name, list(_placed(pieces, experts * rows))
            else:
                yield name, [(self.model.source.checkpoint_name(name), None)]
        for name in (f"{owner}.weight" for owner in self.untied.values()):
            if name not in names:  # the checkpoint has the shared weight under the name of the quantized layer
                yield name, [(name, None)]
        for name in self._whole:  # as the checkpoint names it, unless that is a packed one
            apart = self.model.source.pieces(name)
            yield name, [(name if apart else self.model.source.checkpoint_name(name), None)]
        yield from ((name, [(name, None)]) for name in self.model.source.extra())

    def _named(self, path: str, packed: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a layer as they are stored."""
        for kind, tensor in packed.items():
            turned = kind == "weight" and self.is_transposed(path)
            yield f"{self.prefix(path)}{kind}", tensor.t() if turned else tensor

    def _packed(self, path: str, codes: IntCodes, spec: QuantSpec) -> dict[str, Tensor]:
        try:
            return self.form.pack(codes, spec)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from error

    def _blank(
        self, path: str, spec: WeightSpec, shape: tuple[int, int], weight_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Shapes and dtypes of what the layout makes of a layer of this shape."""
        if isinstance(spec, GgufSpec) or self.config is None:
            return {"weight": _head(shape, weight_dtype)}
        groups = shape[0], shape[1] // spec.group_of(shape[1])
        scale_OG = torch.ones(groups, dtype=getattr(torch, spec.scale_dtype))
        zero_OG = torch.full(groups, spec.midpoint, dtype=torch.uint8)
        packed = self._packed(path, IntCodes(_head(shape, torch.uint8), scale_OG, zero_OG), spec)
        return {kind: tensor.to("meta") for kind, tensor in packed.items()}


def _placed(pieces: tuple[tuple[str, ...], ...], rows: int) -> Iterator[tuple[str, slice]]:
    """Name and rows of every matrix of a stack that has so many rows in all."""
    names = [name for expert in pieces for name in expert]
    each = rows // len(names)
    for place, name in enumerate(names):
        yield name, slice(place * each, (place + 1) * each)


def _head(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def pieces(tensor: Tensor, dtype: torch.dtype, name: str) -> Iterator[Tensor]:
    """The elements of a tensor in their order, some at a time; those of floating-point tensors are cast.

    Args:
        tensor: of any shape.
        dtype: that of the file.
        name: of the tensor, for messages.

    Raises:
        FormatError: a finite value is beyond the dtype's range.
    """
    for piece in torch.split(tensor.cpu().reshape(-1), PIECE):
        yield _cast(piece, dtype, name)


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    ends = torch.stack(result.aminmax()) if result.numel() else result  # which needs no memory of its own
    if not bool(torch.isfinite(ends).all()) and bool((torch.isinf(result) & torch.isfinite(tensor)).any()):
        largest = tensor[torch.isfinite(tensor)].abs().max().item()
        raise FormatError(
            f"{name}: found values up to {largest:g}; needed at most {torch.finfo(dtype).max:g} for {dtype}; "
            "use another --model_dtype, or, where the format takes float16 alone, auto_round:gptqmodel"
        )
    return result
