"""Reading a written checkpoint back: every tensor is compared with what it was made from."""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from autoround.errors import FormatError
from autoround.formats.contents import Contents, pieces
from autoround.formats.types import Format
from autoround.func.rounding import dequantize
from autoround.func.types import IntCodes
from autoround.spec import QuantSpec
from autoround.tensor_files import read_heads, read_tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ADVICE = "export it again"
# Bytes of an element -> the integers that show its bits.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def verify_checkpoint(contents: Contents, folder: Path) -> None:
    """Open the files of a checkpoint anew and compare every tensor with its origin, bit for bit.

    Raises:
        FormatError: a tensor is missing, unexpected or different; names it and its first difference.
    """
    heads = dict(contents.heads())
    files = _Files(folder)
    for name, tensor in contents.kept():
        _compare(name, files.take(name), tensor, heads[name].dtype)
    for path, spec, codes in contents.layers():
        tensors = files.take_layer(contents.prefix(path))
        if "weight" in tensors:
            _compare_dtype(path, tensors["weight"], contents.weight_dtype(path))
            if contents.is_transposed(path):
                tensors["weight"] = tensors["weight"].t()
        _compare_layer(path, tensors, codes, contents.form, spec)
    files.expect_nothing_left()


class _Files:
    """The tensors of a checkpoint by name; each is taken once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._left: dict[str, Path] = {}
        self._layers: dict[str, dict[str, str]] = defaultdict(dict)
        for file, expected in _contents(folder).items():
            try:
                names = set(read_heads(folder / file))
            except (OSError, SafetensorError) as error:
                raise FormatError(f"{folder / file}: {error}; needed a complete file; {_ADVICE}") from error
            if expected and names != expected:
                raise FormatError(
                    f"{folder / file}: found other tensors than {INDEX} lists: {sorted(names ^ expected)[0]}; {_ADVICE}"
                )
            for name in names:
                self._left[name] = folder / file
                layer, _, kind = name.rpartition(".")
                self._layers[f"{layer}."][kind] = name

    def take(self, name: str) -> Tensor:
        """A kept tensor."""
        if name not in self._left:
            raise FormatError(f"{self._folder}: found no tensor {name}; {_ADVICE}")
        layer, _, kind = name.rpartition(".")
        del self._layers[f"{layer}."][kind]
        return read_tensor(self._left.pop(name), name)

    def take_layer(self, prefix: str) -> dict[str, Tensor]:
        """All tensors of a layer that have not been taken, by their last name."""
        return {kind: self.take(name) for kind, name in dict(self._layers[prefix]).items()}

    def expect_nothing_left(self) -> None:
        if self._left:
            raise FormatError(f"{self._folder}: found unexpected tensor {min(self._left)}; {_ADVICE}")


def _contents(folder: Path) -> dict[str, set[str]]:
    """File -> the tensors its index lists; none where there is no index."""
    if not (folder / INDEX).exists():
        return {SINGLE: set()}
    contents: dict[str, set[str]] = defaultdict(set)
    for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items():
        contents[file].add(name)
    return contents


def _compare_layer(path: str, tensors: Mapping[str, Tensor], codes: IntCodes, form: Format, spec: QuantSpec) -> None:
    try:
        found = form.unpack(tensors, spec)
    except KeyError as error:
        raise FormatError(f"{path}: found no tensor {error}; {_ADVICE}") from error
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    if not isinstance(found, IntCodes):
        _compare(path, found, dequantize(codes, spec), found.dtype)
        return
    for field, got, wanted in zip(IntCodes._fields, found, codes, strict=True):
        _compare(f"{path}: {field}", got, wanted, wanted.dtype)


def _compare_dtype(where: str, found: Tensor, dtype: torch.dtype) -> None:
    if found.dtype != dtype:
        raise FormatError(f"{where}: found {found.dtype}; needed {dtype}; {_ADVICE}")


def _compare(where: str, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise at the first element whose bits differ from what was expected, cast to the dtype of the file."""
    _compare_dtype(where, found, dtype)
    if found.shape != expected.shape:
        raise FormatError(f"{where}: found shape {tuple(found.shape)}; needed {tuple(expected.shape)}; {_ADVICE}")
    start, count, first = 0, 0, ""
    for got, wanted in zip(pieces(found, dtype, where), pieces(expected, dtype, where), strict=True):
        words = [piece.view(_WORDS[piece.itemsize]) for piece in (got, wanted)]
        if not torch.equal(*words):  # which needs no memory of its own
            places = (words[0] != words[1]).nonzero()[:, 0]
            place = tuple(index.item() for index in torch.unravel_index(start + places[0], found.shape))
            first = first or f"found {got[places[0]].item()} at {place}; needed {wanted[places[0]].item()}"
            count += len(places)
        start += got.numel()
    if count:
        raise FormatError(f"{where}: {first}; {count} of {start} elements differ; {_ADVICE}")
