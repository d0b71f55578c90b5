"""The one writer: streams a model with its quantized layers replaced into a new checkpoint folder."""

import errno
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from autoround.errors import FormatError, UsageError
from autoround.formats.contents import Contents, Source, cast
from autoround.formats.verify import INDEX, SINGLE, verify_checkpoint

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def write_checkpoint(
    contents: Contents, folder: Path, *, max_shard_size: str | int = "5GB", overwrite: bool = False
) -> None:
    """Write a checkpoint folder, read it back and compare it with the codes, and only then give it its name.

    Needs memory for the codes of one block and for one shard.

    Args:
        contents: what to write; codes are asked for twice, block after block.
        folder: must not exist or be empty, unless ``overwrite``; then it is replaced as a whole.
        max_shard_size: largest size of one file, such as "5GB"; a single larger tensor gets a file of its own.
        overwrite: replace what the folder holds.

    Raises:
        UsageError: ``max_shard_size`` is not a size.
        FormatError: the folder is in use, the disk is full, the layout cannot hold the codes, or what was written
            does not match them; nothing is left behind.
    """
    limit = parse_size(max_shard_size)

    def write(partial: Path) -> None:
        _write_weights(contents, partial, limit)
        _write_side_files(contents, partial)

    write_folder(
        folder,
        write,
        functools.partial(verify_checkpoint, contents),
        needed=contents.expected_bytes(),
        overwrite=overwrite,
    )


def write_folder(
    folder: Path, write: Callable[[Path], None], verify: Callable[[Path], None], *, needed: int, overwrite: bool
) -> None:
    """Fill a folder under another name, check it, and only then give it its own.

    Args:
        folder: must not exist or be empty, unless ``overwrite``; then it is replaced as a whole.
        write: fills the folder that it is given.
        verify: reads that folder back; raises where it is not as it should be.
        needed: bytes that will be written.
        overwrite: replace what the folder holds.

    Raises:
        FormatError: the folder is in use, the disk is full or not writable; nothing is left behind, whatever is raised.
    """
    check_folder(folder, overwrite=overwrite)
    partial = folder.with_name(f".{folder.name}.partial")
    with ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, partial, ignore_errors=True)
        with _reported(folder, needed):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            if shutil.disk_usage(partial).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(partial)
            _sync(partial)
        verify(partial)
        _move(partial, folder)


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that is in use.

    Raises:
        FormatError: it exists, is not empty, and may not be replaced, or is not a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"{folder}: found a file; needed a folder or nothing; use another --output_dir")
    if folder.exists() and not overwrite and any(folder.iterdir()):
        raise FormatError(
            f"{folder}: found other files; needed an empty folder; use another --output_dir or --overwrite"
        )


def parse_size(text: str | int) -> int:
    """Bytes for a number or for text such as "5GB" or "500 MB" (powers of ten).

    Raises:
        UsageError: the text is not a positive size.

    >>> parse_size("1.5GB")
    1500000000
    """
    match = _SIZE.fullmatch(str(text).strip())
    size = 0 if match is None else int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise UsageError(f"max_shard_size: found {text!r}; needed a size such as 5GB or 500MB")
    return size


class _Shards:
    """Weight files of bounded size; which tensor is in which is known at the end."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._written: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > self._limit:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, name the files and write their index if there are several."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self._part(0).rename(self._folder / SINGLE)
            return
        weight_map = {}
        for number, names in enumerate(self._written):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._folder / file)
            weight_map.update(dict.fromkeys(names, file))
        _write_json(self._folder / INDEX, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map})

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._written)), {"format": "pt"})
        self._written.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"


def _write_weights(contents: Contents, folder: Path, limit: int) -> None:
    shards = _Shards(folder, limit)
    for name, tensor in contents.kept():
        shards.add(name, tensor)
    for path, spec, codes in contents.layers():
        try:
            tensors = contents.form.pack(codes, spec)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from error
        for kind, tensor in tensors.items():
            if kind == "weight":
                weight = cast(tensor, contents.weight_dtype(path), path)
                tensor = weight.t() if contents.is_transposed(path) else weight
            shards.add(f"{contents.prefix(path)}{kind}", tensor)
    shards.close()


def _write_side_files(contents: Contents, folder: Path) -> None:
    """Everything but weights."""
    model = contents.model
    for file in model.side_files():
        shutil.copyfile(file, folder / file.name)
    if model.own_tokenizer is not None or model.gguf_file is not None:
        model.tokenizer().save_pretrained(folder)
    if not model.side_files() and model.skeleton.generation_config is not None:
        model.skeleton.generation_config.save_pretrained(folder)
    settings: dict[str, Any] = json.loads(model.config.to_json_string())
    settings["architectures"] = settings.get("architectures") or [type(model.skeleton).__name__]
    if contents.untied:
        settings["tie_word_embeddings"] = False
    if contents.target is not None or not settings.get("dtype"):
        settings["dtype"] = str(contents.target or _float_dtype(model.source)).removeprefix("torch.")
    if (config := contents.form.config(contents.plan)) is not None:
        settings["quantization_config"] = config
        for name in contents.form.config_copies:
            _write_json(folder / name, config)
    _write_json(folder / "config.json", settings)
    for file in folder.glob("*.safetensors"):  # which safetensors makes readable for their owner only
        shutil.copymode(folder / "config.json", file)


def _float_dtype(source: Source) -> torch.dtype:
    """Dtype of the first floating-point tensor."""
    dtypes = (source.dtype(name) for name in source.names())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def _sync(folder: Path) -> None:
    """Wait until every file and the folder itself are on the disk."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move(partial: Path, folder: Path) -> None:
    """Give a finished folder its name, in place of what has it."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _reported(folder: Path, needed: int) -> Iterator[None]:
    """Turn failures to write into one line that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_disk_full(error):
            raise FormatError(f"{folder}: {error}; needed a writable folder; use another --output_dir") from error
        parent = next(parent for parent in folder.absolute().parents if parent.exists())
        free = shutil.disk_usage(parent).free
        raise FormatError(
            f"{folder}: found {free / 1e6:.0f} MB free on the disk; needed about {needed / 1e6:.0f} MB; "
            "free some space or use another --output_dir"
        ) from error


def _is_disk_full(error: Exception) -> bool:
    """Safetensors passes the operating system's error on as text."""
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
