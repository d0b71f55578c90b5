"""Where weights come from: one tensor at a time, never the whole model."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from autoround.errors import ModelError
from autoround.model.low_precision import dequantize, fold
from autoround.model.names import Pieces, add_tied, match_names, written_names
from autoround.tensor_files import read_heads, read_tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Tensors by their names in the checkpoint: the file of each, and each without data.
Headers: TypeAlias = tuple[dict[str, Path], dict[str, Tensor]]


class WeightSource(Protocol):
    """Tensors of a model by module name.

    Every method but ``names`` takes any name of a tied weight and raises ModelError for a name that is not there.
    """

    def names(self) -> tuple[str, ...]:
        """Module names of all parameters and persistent buffers; of tied weights only those that are stored."""
        ...

    def checkpoint_name(self, name: str) -> str:
        """Name under which a checkpoint of this model holds the tensor."""
        ...

    def pieces(self, name: str) -> Pieces:
        """Names under which a checkpoint holds the matrices of a stack of experts; none for other tensors."""
        ...

    def extra(self) -> tuple[str, ...]:
        """Checkpoint names of tensors of modules that the model does not have; they are asked for by these."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as the module has it."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of what ``read`` returns."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype (float32 where that is not torch's), on the CPU; not to be written to."""
        ...


class StoredNames:
    """Lookup of stored tensors by module name, complete by construction.

    Raises:
        ModelError: a parameter of the model is not stored.
    """

    def __init__(
        self, skeleton: PreTrainedModel, stored: Mapping[str, str], where: str, extra: tuple[str, ...] = ()
    ) -> None:
        self._where = where
        self._names = tuple(stored)
        self._extra = extra
        self._keys = {**add_tied(skeleton, stored), **{key: key for key in extra}}
        missing = [name for name, _ in skeleton.named_parameters() if name not in self._keys]
        if missing:
            raise ModelError(
                f"{where}: found no tensor {missing[0]} ({len(missing)} are missing); needed all parameters of "
                f"{type(skeleton).__name__}; download the checkpoint again"
            )

    def names(self) -> tuple[str, ...]:
        return self._names

    def extra(self) -> tuple[str, ...]:
        return self._extra

    def pieces(self, name: str) -> Pieces:
        self.key(name)
        return ()

    def key(self, name: str) -> str:
        if name not in self._keys:
            raise ModelError(f"{self._where}: found no tensor {name}; needed one of {', '.join(self._names[:3])}, …")
        return self._keys[name]


class SafetensorsSource(StoredNames):
    """A folder with ``model.safetensors``, or with shards and their index.

    Tensors are mapped, not loaded, and only while they are in use. FP8 and MXFP4 read as bfloat16.

    Args:
        folder: where the files are.
        skeleton: the model.
        headers: what ``read_headers`` would return, of files that need not be there until a tensor is read.

    Raises:
        ModelError: no such files, a missing or damaged one, or tensors that do not fit the model; names the file.
    """

    def __init__(self, folder: Path, skeleton: PreTrainedModel, headers: Headers | None = None) -> None:
        self._files, stored_heads = headers or read_headers(folder)
        self._heads, self._parts = fold(stored_heads, str(folder))
        found = match_names(skeleton, self._heads, str(folder))
        self._stacked, self._turned = found.stacked, set[str]()
        firsts = {name: pieces[0][0] for name, pieces in self._stacked.items()}
        stored = {**found.single, **firsts}
        super().__init__(skeleton, stored, str(folder), found.extra)
        for name, tensor in skeleton.state_dict().items():
            if name in found.turnable and self.shape(name) == tuple(tensor.mT.shape) != tuple(tensor.shape):
                self._turned.add(name)
            if name in stored and self.shape(name) != tuple(tensor.shape):
                raise ModelError(
                    f"{self._files.get(stored[name], folder)}: found {stored[name]} of shape {self.shape(name)}; "
                    f"needed {tuple(tensor.shape)} as config.json says; check that the two belong together"
                )

    def checkpoint_name(self, name: str) -> str:
        return self.key(name)

    def pieces(self, name: str) -> Pieces:
        self.key(name)
        return self._stacked.get(name, ())

    def shape(self, name: str) -> tuple[int, ...]:
        if pieces := self.pieces(name):
            return stack_shape(self._heads, pieces, f"{self._where}: {name}")
        head = self._heads[self.key(name)]
        return tuple((head.mT if name in self._turned else head).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._heads[self.key(name)].dtype

    def read(self, name: str) -> Tensor:
        key = self.key(name)
        pieces = self.pieces(name)
        if pieces:
            return read_stack(self._read, pieces, self.shape(name))
        return self._read(key).mT.contiguous() if name in self._turned else self._read(key)

    def _read(self, key: str) -> Tensor:
        """A tensor by its name in the checkpoint."""
        if key not in self._parts:
            return read_tensor(self._files[key], key)
        try:
            return dequantize(*(read_tensor(self._files[part], part) for part in self._parts[key]))
        except ModelError as error:
            raise ModelError(f"{self._files[self._parts[key][0]]}: {key}: {error}") from error


class ModuleSource(StoredNames):
    """A model in memory; reading copies nothing."""

    def __init__(self, module: PreTrainedModel, skeleton: PreTrainedModel) -> None:
        persistent = module.state_dict()
        self._tensors: dict[str, Tensor] = dict(module.named_parameters())
        self._tensors.update({name: buffer for name, buffer in module.named_buffers() if name in persistent})
        self._written = written_names(skeleton)
        super().__init__(skeleton, {name: name for name in self._tensors}, type(module).__name__)

    def checkpoint_name(self, name: str) -> str:
        return self._written.single.get(name, self.key(name))

    def pieces(self, name: str) -> Pieces:
        self.key(name)
        return self._written.stacked.get(name, ())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[self.key(name)].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[self.key(name)].dtype

    def read(self, name: str) -> Tensor:
        return self._tensors[self.key(name)].detach()


def read_headers(folder: Path) -> Headers:
    """The tensors of a folder by their names in the checkpoint: the file of each, and each without data.

    Raises:
        ModelError: no files with weights, or a missing or damaged one; names the file.
    """
    files: dict[str, Path] = {}
    heads: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        own = read_header(file)
        heads.update(own)
        files.update(dict.fromkeys(own, file))
    return files, heads


def stack_shape(heads: Mapping[str, Tensor], pieces: Pieces, where: str) -> tuple[int, ...]:
    """Shape of a stack of experts, (E, O, I), by the shapes of its matrices.

    Raises:
        ModelError: these differ.
    """
    shapes = {tuple(heads[key].shape) for expert in pieces for key in expert}
    if len(shapes) > 1:
        raise ModelError(f"{where}: found experts of different shapes; needed equal ones; download it again")
    rows, columns = shapes.pop()
    return len(pieces), len(pieces[0]) * rows, columns


def read_stack(read: Callable[[str], Tensor], pieces: Pieces, shape: tuple[int, ...]) -> Tensor:
    """A stack of experts, each matrix read, by its name in the checkpoint, when its turn comes."""
    stack = torch.empty(0)
    for expert, keys in enumerate(pieces):
        own = torch.cat([read(key) for key in keys])
        stack = own.new_empty(shape) if expert == 0 else stack
        stack[expert] = own
    return stack


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold the weights, each of them there."""
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    shards = shard_names(folder)
    for shard in shards:
        if not (folder / shard).is_file():
            raise ModelError(
                f"{folder}: found no {shard}; needed the {len(shards)} files of {INDEX}; download it again"
            )
    return tuple(folder / shard for shard in shards)


def shard_names(folder: Path) -> list[str]:
    """The files that an index names, in order.

    Raises:
        ModelError: it is not a valid index.
    """
    try:
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{folder / INDEX}: found no weight_map ({error!r}); needed a valid index; download it again"
        ) from error


def _no_weights(folder: Path) -> ModelError:
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled:
        found, advice = (
            pickled[0],
            "convert it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)",
        )
    elif gguf := sorted(file.name for file in folder.glob("*.gguf")):
        found, advice = gguf[0], f"name the file itself: {folder / gguf[0]}"
    else:
        found, advice = "no weights", "check the folder"
    return ModelError(f"{folder}: found {found}; needed {WEIGHTS} or {INDEX}; {advice}")


def read_header(file: Path) -> dict[str, Tensor]:
    """Meta tensors of a file's contents; safetensors checks the header against the file's size."""
    try:
        return read_heads(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file}: found a damaged or truncated file ({error}); needed complete safetensors; download it again"
        ) from error
