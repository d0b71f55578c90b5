"""Opening a model: its modules without weights, and a source to read these from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from autoround.errors import ModelError
from autoround.log import LOGGER
from autoround.model.gguf import GgufSource, open_gguf, read_config
from autoround.model.hub import SIDE_FILES, download
from autoround.model.low_precision import METHODS
from autoround.model.oddities import needed_settings
from autoround.model.processor import BLIND, open_processor
from autoround.model.remote import remote_headers
from autoround.model.skeleton import build_skeleton, copy_skeleton, sees_images
from autoround.model.source import INDEX, Headers, ModuleSource, SafetensorsSource, WeightSource

CONFIG = "config.json"
# Written anew with every checkpoint; the last three are where loaders look for the quantization of a folder.
_REWRITTEN = (CONFIG, INDEX, "quantize_config.json", "quant_config.json", "quantization_config.json")


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A model that is opened, not loaded.

    Attributes:
        name: as the user gave it.
        skeleton: the transformers model in eval mode; parameters on the meta device, buffers with their initial values.
        config: its configuration, as it was read.
        source: its weights.
        folder: where its files are; None for a model in memory.
        gguf_file: name of the GGUF file in that folder, if that is where the weights are.
        trust_remote_code: whether Python code that comes with the model may run.
        own_tokenizer: what the user gave in place of the model's tokenizer or processor: an object, a name, or None.
    """

    name: str
    skeleton: PreTrainedModel
    config: PreTrainedConfig
    source: WeightSource
    folder: Path | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False
    own_tokenizer: Any = None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer.

        Raises:
            ModelError: there is none, or it cannot be loaded.
        """
        if isinstance(self.own_tokenizer, ProcessorMixin):
            own: PreTrainedTokenizerBase = self.own_tokenizer.tokenizer
            return own
        if self.own_tokenizer is not None and not isinstance(self.own_tokenizer, str | Path):
            return self.own_tokenizer
        origin = self.own_tokenizer or self.folder
        if origin is None:
            raise ModelError(f"{self.name}: found no tokenizer with a model in memory; needed one; pass tokenizer=")
        gguf_file = None if self.own_tokenizer else self.gguf_file
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                origin, gguf_file=gguf_file, trust_remote_code=self.trust_remote_code
            )
        except (ValueError, OSError, KeyError, ImportError) as error:
            raise ModelError(
                f"{origin}: found no tokenizer that loads: {error}; needed its files beside the weights"
            ) from error
        return tokenizer

    def processor(self) -> ProcessorMixin:
        """Load the processor of images and text.

        Raises:
            ModelError: the model sees no images, or there is no processor that loads.
        """
        if not sees_images(self.config):
            raise ModelError(f"{self.name}: {BLIND}")
        if isinstance(self.own_tokenizer, ProcessorMixin):
            return self.own_tokenizer
        if self.folder is None:
            raise ModelError(
                f"{self.name}: found no processor with a model in memory; needed one for images; pass it as tokenizer="
            )
        return open_processor(self.folder, self.config, trust_remote_code=self.trust_remote_code)

    def side_files(self) -> tuple[Path, ...]:
        """Files of the folder that a changed copy of the model takes over unchanged: tokenizer, templates, code, …"""
        if self.folder is None or self.gguf_file is not None:
            return ()
        files = {file for pattern in SIDE_FILES for file in self.folder.glob(pattern)}
        return tuple(sorted(file for file in files if file.name not in _REWRITTEN and file.is_file()))


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the one in a folder of no other model; None for anything else.

    Raises:
        ModelError: the folder has several.
    """
    path = path.expanduser()
    if path.suffix == ".gguf" and not path.is_dir():
        return path
    files = [] if (path / CONFIG).is_file() else sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ModelError(f"{path}: found {len(files)} GGUF files; needed one; name the file, such as {files[0]}")
    return files[0] if files else None


def open_model(
    model: "str | Path | nn.Module | OpenModel",
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    attn_implementation: str | None = None,
) -> OpenModel:
    """Open a model; no weight is loaded, but all files are checked to be complete.

    Args:
        model: a folder, a ``.gguf`` file, a hub name, or a transformers model in memory, which is never changed; one
            that is opened already is returned.
        revision: branch, tag or commit of a hub name.
        cache_dir: where hub downloads are kept.
        token: for private hub models.
        trust_remote_code: run Python code that comes with the model.
        tokenizer: a tokenizer or its name, in place of the model's own.
        attn_implementation: "sdpa" or "eager", where the model has it; transformers' choice when None.

    Raises:
        ModelError: no such model, missing, damaged or already quantized files, or an unsupported architecture.
    """
    if isinstance(model, OpenModel):
        opened = model
    elif isinstance(model, nn.Module):
        opened = _open_module(model, tokenizer)
    elif (path := Path(model).expanduser()).suffix == ".gguf":
        opened = _open_gguf(path, tokenizer)
    else:
        folder = path if path.exists() else download(str(model), revision=revision, cache_dir=cache_dir, token=token)
        opened = _open_folder(str(model), folder, tokenizer, trust_remote_code)
    if attn_implementation is not None:
        _set_attention(opened, attn_implementation)
    return opened


def open_headers(
    model: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> OpenModel:
    """``open_model``, but the weights of a hub model stay there: what is known of them comes from their headers.

    Args and errors are those of ``open_model``.
    """
    path = Path(model).expanduser()
    if path.exists() or path.suffix == ".gguf":
        return open_model(path, trust_remote_code=trust_remote_code)
    folder = download(str(model), revision=revision, cache_dir=cache_dir, token=token, weights=False)
    headers = remote_headers(str(model), folder, token=token)
    return _open_folder(str(model), folder, None, trust_remote_code, headers)


def _open_module(module: nn.Module, tokenizer: Any) -> OpenModel:
    name = type(module).__name__
    if not isinstance(module, PreTrainedModel):
        raise ModelError(f"{name}: found a plain module; needed a transformers model (PreTrainedModel)")
    _refuse_quantized(module.config.to_dict(), name)
    if absent := [key for key, tensor in module.state_dict().items() if tensor.is_meta]:
        raise ModelError(
            f"{name}: found {absent[0]} without data; needed all weights in memory; load without offloading"
        )
    skeleton = copy_skeleton(module)
    return OpenModel(
        name=module.name_or_path or name, skeleton=skeleton, config=module.config,
        source=ModuleSource(module, skeleton), own_tokenizer=tokenizer)  # fmt: skip


def _open_gguf(path: Path, tokenizer: Any) -> OpenModel:
    file = open_gguf(path)
    config = read_config(file)
    skeleton = build_skeleton(config, str(path))
    return OpenModel(
        name=str(path), skeleton=skeleton, config=config, source=GgufSource(file, skeleton),
        folder=path.parent, gguf_file=path.name, own_tokenizer=tokenizer)  # fmt: skip


def _open_folder(
    name: str, folder: Path, tokenizer: Any, trust_remote_code: bool, headers: Headers | None = None
) -> OpenModel:
    config = folder_config(folder, trust_remote_code=trust_remote_code)
    skeleton = build_skeleton(config, str(folder), trust_remote_code=trust_remote_code)
    return OpenModel(
        name=name, skeleton=skeleton, config=config, source=SafetensorsSource(folder, skeleton, headers),
        folder=folder, trust_remote_code=trust_remote_code, own_tokenizer=tokenizer)  # fmt: skip


def folder_config(folder: Path, *, trust_remote_code: bool, quantized: bool = False) -> PreTrainedConfig:
    """The configuration of a model's folder, with what the table of exceptions says that it has to be.

    Args:
        folder: as ``save_pretrained`` writes it.
        trust_remote_code: run Python code that comes with the model.
        quantized: take a checkpoint that is quantized; its quantization config is left out.

    Raises:
        ModelError: there is none, or not one that this transformers takes; or it is of a quantized checkpoint.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise ModelError(f"{folder}: found no {CONFIG}; needed a folder as save_pretrained writes it; check the path")
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ModelError(
            f"{file}: found invalid JSON ({error}); needed a model's configuration; download it again"
        ) from error
    if not quantized:
        _refuse_quantized(settings, str(file), METHODS)
    model_type = settings.get("model_type")
    if model_type not in CONFIG_MAPPING and "auto_map" not in settings:
        raise ModelError(
            f"{file}: found model type {model_type}; needed one that this transformers knows; a newer version may, "
            "run `pip install -U transformers`"
        )
    if model_type not in CONFIG_MAPPING and not trust_remote_code:
        raise ModelError(
            f"{file}: found model type {model_type}, which needs the Python code that comes with the model; "
            "read that code and run again with --trust_remote_code"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError, ImportError, StrictDataclassError) as error:
        cause = " ".join(str(error).split())
        raise ModelError(
            f"{file}: found a configuration that transformers refuses: {cause}; correct the file"
        ) from error
    vars(config).pop("quantization_config", None)
    for name, value in needed_settings(config.model_type).items():
        setattr(config, name, value)
    return config


def _refuse_quantized(settings: dict[str, Any], where: str, readable: tuple[str, ...] = ()) -> None:
    quantization = settings.get("quantization_config")
    method = (quantization or {}).get("quant_method")
    if quantization and method not in readable:
        raise ModelError(
            f"{where}: found weights already quantized by {method}; needed a float model, or a folder in fp8 or mxfp4; "
            "give the original one"
        )


def _set_attention(model: OpenModel, implementation: str) -> None:
    try:
        model.skeleton.set_attn_implementation(implementation)
    except (ValueError, ImportError):
        own = model.skeleton.config._attn_implementation
        LOGGER.warning("%s: has no %s attention; uses %s", model.name, implementation, own)
