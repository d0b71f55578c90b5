"""Checkpoints of every layout opened for a forward block by block: each weight is dequantized when it is read."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from autoround import func
from autoround.convert import QuantizedModel, open_quantized
from autoround.evaluate.settings import Access
from autoround.func.block import transposed_weights
from autoround.model.gguf import open_gguf
from autoround.model.hub import download
from autoround.model.load import CONFIG, OpenModel, gguf_file, open_model
from autoround.model.low_precision import METHODS
from autoround.model.source import StoredNames
from autoround.spec import QuantSpec

_GGUF_FLOATS = ("F32", "F16", "BF16", "F64")


class DequantizedSource(StoredNames):
    """The tensors of a quantized checkpoint as those of a float model."""

    def __init__(self, quantized: QuantizedModel) -> None:
        self._quantized, layers = quantized, quantized.plan.layers
        self._paths = {layers[path].shape.parameter: path for path in quantized.plan.specs}
        self._turned = transposed_weights(quantized.model.skeleton)
        names = (*quantized.source.names(), *self._paths)
        super().__init__(quantized.model.skeleton, {name: name for name in names}, quantized.model.name)

    def checkpoint_name(self, name: str) -> str:
        return self._quantized.source.checkpoint_name(self.key(name))

    def shape(self, name: str) -> tuple[int, ...]:
        key = self.key(name)
        if key in self._paths:
            return tuple(self._quantized.model.skeleton.get_parameter(key).shape)
        return self._quantized.source.shape(key)

    def dtype(self, name: str) -> torch.dtype:
        key = self.key(name)
        return torch.float32 if key in self._paths else self._quantized.source.dtype(key)

    def read(self, name: str) -> Tensor:
        """A packed weight is float32: scale times the distance of its codes from the zero point.

        Raises:
            FormatError: the columns of a layer are not in order.
        """
        key = self.key(name)
        if key not in self._paths:
            return self._quantized.source.read(key)
        path = self._paths[key]
        spec = self._quantized.plan.specs[path]
        assert isinstance(spec, QuantSpec), "no folder of safetensors holds other codes"
        weight = func.dequantize(self._quantized.codes(path, spec), spec)
        experts = self._quantized.plan.layers[path].shape.experts
        if experts:  # one below the other
            weight = weight.view(experts, -1, weight.shape[1])
        return weight.mT if f"{path}.weight" in self._turned else weight


def open_checkpoint(path: str | Path, access: Access = Access()) -> OpenModel:  # noqa: B008
    """Open a float or quantized checkpoint; no weight is loaded.

    Args:
        path: hub name, folder or ``.gguf`` file; a folder may hold one of these.
        access: how it is reached.

    Raises:
        AutoRoundError: no such checkpoint, one that is damaged, or a layout that this package does not read.
    """
    if (file := gguf_file(Path(path))) is not None:
        return open_model(file)
    folder = locate(path, access)
    if quantization_of(folder):
        quantized = open_quantized(folder, trust_remote_code=access.trust_remote_code)
        return replace(quantized.model, name=str(path), source=DequantizedSource(quantized))
    return replace(open_model(folder, trust_remote_code=access.trust_remote_code), name=str(path))


def is_quantized(path: str | Path, access: Access = Access()) -> bool:  # noqa: B008
    """Whether a checkpoint's weights are quantized.

    Args:
        path: hub name, folder or ``.gguf`` file.
        access: how it is reached.

    Raises:
        ModelError: no such model.
    """
    if (file := gguf_file(Path(path))) is not None:
        return any(tensor.tensor_type.name not in _GGUF_FLOATS for tensor in open_gguf(file).tensors.values())
    return bool(quantization_of(locate(path, access)))


def locate(path: str | Path, access: Access = Access()) -> Path:  # noqa: B008
    """Where a checkpoint is, or comes to when it is downloaded.

    Args:
        path: hub name, folder or file.
        access: how it is reached.

    Raises:
        ModelError: there is no such checkpoint, here or on the hub.
    """
    folder = Path(path).expanduser()
    if folder.exists():
        return folder
    return download(str(path), revision=access.revision, cache_dir=access.cache_dir, token=access.token)


def quantization_of(folder: Path) -> str:
    """The method by which a checkpoint's folder is quantized; empty for one that opens as a float one, or for none."""
    try:
        settings = json.loads((folder / CONFIG).read_text()).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return ""
    method = str(settings.get("quant_method", "unknown")) if isinstance(settings, dict) else ""
    return "" if method in METHODS else method
