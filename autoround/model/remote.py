"""Headers of weight files that stay on the hub, read by range requests."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HTTPError,  # type: ignore[attr-defined]
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import SafetensorsFileMetadata
from torch import Tensor

from autoround.errors import ModelError
from autoround.model.source import INDEX, WEIGHTS, Headers, read_headers, shard_names
from autoround.tensor_files import dtypes_of

_REQUESTS_AT_ONCE = 8


def remote_headers(name: str, folder: Path, *, token: str | bool | None) -> Headers:
    """What ``read_headers`` would return of a hub model whose weights were not downloaded.

    Args:
        name: such as ``Qwen/Qwen3-0.6B``.
        folder: what else was downloaded of it, in the hub's cache and so named after the commit.
        token: for private and gated models.

    Raises:
        ModelError: the model has no safetensors, damaged ones, or the hub is out of reach.
    """
    files = shard_names(folder) if (folder / INDEX).is_file() else [WEIGHTS]
    if all((folder / file).is_file() for file in files):
        return read_headers(folder)
    ask = partial(HfApi().parse_safetensors_file_metadata, name, revision=folder.name, token=token)
    try:
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as threads:
            found = dict(zip(files, threads.map(ask, files), strict=True))
    except (NotASafetensorsRepoError, SafetensorsParsingError, RemoteEntryNotFoundError) as error:
        raise ModelError(
            f"{name}: found no safetensors ({_line(error)}); needed {WEIGHTS} or {INDEX}; convert the model, or name a "
            ".gguf file"
        ) from error
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(
            f"{name}: found no weights in the cache and no connection to the hub ({_line(error)}); needed one of "
            "them; check the network, or give a local folder"
        ) from error
    paths: dict[str, Path] = {}
    heads: dict[str, Tensor] = {}
    for file, metadata in found.items():
        own = _heads(metadata)
        heads.update(own)
        paths.update(dict.fromkeys(own, folder / file))
    return paths, heads


def _heads(metadata: SafetensorsFileMetadata) -> dict[str, Tensor]:
    """Tensors without data, in the order in which safetensors lists them."""
    dtypes = dtypes_of({str(tensor.dtype) for tensor in metadata.tensors.values()})
    return {
        name: torch.empty(tuple(tensor.shape), dtype=dtypes[str(tensor.dtype)], device="meta")
        for name, tensor in sorted(metadata.tensors.items())
    }


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
