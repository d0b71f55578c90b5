"""The one writer: streams a model with its quantized layers replaced into a new checkpoint folder."""

import errno
import functools
import itertools
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import ProcessorMixin

from autoround.errors import FormatError, UsageError
from autoround.formats.contents import Contents, Source, pieces
from autoround.formats.verify import INDEX, SINGLE, verify_checkpoint

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def write_checkpoint(
    contents: Contents, folder: Path, *, max_shard_size: str | int = "5GB", overwrite: bool = False
) -> None:
    """Write a checkpoint folder, read it back and compare it with the codes, and only then give it its name.

    Needs memory for the codes of one block and for the tensors of one layer, not for a file.

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
        needed=sum(head.nbytes for _, head in contents.heads()),
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
    folder = folder.resolve()  # the end of a link, on whose disk the files are to lie
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
        FormatError: it is no folder, a disk is mounted there, or it is not empty and may not be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"{folder}: found a file; needed a folder or nothing; use another --output_dir")
    if os.path.ismount(folder):
        raise FormatError(f"{folder}: found a mounted disk; needed a folder that can be renamed; use one below it")
    if folder.exists() and not overwrite and any(folder.iterdir()):
        raise FormatError(
            f"{folder}: found other files; needed an empty folder; use another --output_dir or --overwrite"
        )


def check_alone(folder: Path) -> None:
    """Refuse to replace a folder of one format that holds what runs for other formats left in it.

    Raises:
        FormatError: names them.
    """
    kept = [child.name for child in sorted(folder.iterdir() if folder.is_dir() else ())
            if child.is_dir() and (child.suffix == ".journal" or any(child.glob("*.gguf"))
                                   or (child / "config.json").exists())]  # fmt: skip
    if kept:
        raise FormatError(
            f"{folder}: found {', '.join(kept)}; needed a folder without other formats, which would be lost; "
            "use another --output_dir or --overwrite"
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


def checkpoint_files(contents: Contents, *, max_shard_size: str | int = "5GB") -> dict[str, int]:
    """The files of weights that ``write_checkpoint`` would write, the index of shards included: name -> bytes.

    Codes are not asked for.

    Args:
        contents: what would be written.
        max_shard_size: largest size of one file.

    Raises:
        UsageError: ``max_shard_size`` is not a size.
    """
    shards = _shards(contents.heads(), parse_size(max_shard_size))
    sizes = {
        file: len(_header(heads)[0]) + sum(head.nbytes for head in heads.values()) for file, heads in shards.items()
    }
    return sizes | ({INDEX: len(_json(_index(shards)).encode())} if len(shards) > 1 else {})


def _write_weights(contents: Contents, folder: Path, limit: int) -> None:
    """Fill files of bounded size tensor by tensor, and index them if there are several."""
    shards, tensors = _shards(contents.heads(), limit), contents.tensors()
    for file, heads in shards.items():
        with (folder / file).open("wb") as stream:
            header, place = _header(heads)
            stream.write(header)
            for name, tensor in itertools.islice(tensors, len(heads)):
                stream.seek(place[name])
                parts = pieces(tensor, heads[name].dtype, name)
                written = sum(stream.write(part.view(torch.uint8).numpy().data) for part in parts)
                assert written == heads[name].nbytes, f"{name}: {written} of {heads[name].nbytes} bytes"
    if len(shards) > 1:
        _write_json(folder / INDEX, _index(shards))


def _index(shards: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """What tells in which file each tensor is."""
    total = sum(head.nbytes for heads in shards.values() for head in heads.values())
    weight_map = {name: file for file, heads in shards.items() for name in heads}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _file_names(count: int) -> list[str]:
    return (
        [SINGLE] if count == 1 else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    )


def _shards(heads: Iterable[tuple[str, Tensor]], limit: int) -> dict[str, dict[str, Tensor]]:
    """Share tensors out to files, in their order: name of the file -> its tensors."""
    shards: list[dict[str, Tensor]] = [{}]
    free = limit
    for name, head in heads:
        if head.nbytes > free and shards[-1]:
            shards.append({})
            free = limit
        shards[-1][name] = head
        free -= head.nbytes
    return dict(zip(_file_names(len(shards)), shards, strict=True))


def _header(heads: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """How a safetensors file begins, and where each tensor belongs in it.

    The library itself tells the order in a file and the names of dtypes: by the header that it gives empty tensors.
    """
    empty = save({name: torch.empty(0, dtype=head.dtype) for name, head in heads.items()}, {"format": "pt"})
    header, offset = json.loads(empty[8:]), 0
    for name, entry in header.items():
        if name in heads:
            entry["shape"] = list(heads[name].shape)
            entry["data_offsets"] = [offset, offset := offset + heads[name].nbytes]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = struct.pack("<Q", len(text)) + text
    return begin, {name: len(begin) + header[name]["data_offsets"][0] for name in heads}


def _write_side_files(contents: Contents, folder: Path) -> None:
    """Everything but weights."""
    model = contents.model
    for file in model.side_files():
        shutil.copyfile(file, folder / file.name)
    if model.own_tokenizer is not None or model.gguf_file is not None:
        own = model.own_tokenizer
        (own if isinstance(own, ProcessorMixin) else model.tokenizer()).save_pretrained(folder)
    if not model.side_files() and model.skeleton.generation_config is not None:
        model.skeleton.generation_config.save_pretrained(folder)
    settings: dict[str, Any] = json.loads(model.config.to_json_string())
    settings["architectures"] = settings.get("architectures") or [type(model.skeleton).__name__]
    if contents.untied:
        untie(settings)
    if contents.target is not None or not settings.get("dtype"):
        settings["dtype"] = str(contents.target or _float_dtype(model.source)).removeprefix("torch.")
    if (config := contents.config) is not None:
        settings["quantization_config"] = config
        for name in contents.form.config_copies:
            _write_json(folder / name, config)
    _write_json(folder / "config.json", settings)


def _float_dtype(source: Source) -> torch.dtype:
    """Dtype of the first floating-point tensor."""
    dtypes = (source.dtype(name) for name in source.names())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def untie(settings: dict[str, Any]) -> None:
    """Say so of a model and of its parts: vision-language models tie by what their text part says."""
    settings["tie_word_embeddings"] = False
    for part in settings.values():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            untie(part)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(_json(content))


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


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
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise FormatError(f"{folder}: {error}; needed a writable folder; use another --output_dir") from error
        parent = next(parent for parent in folder.absolute().parents if parent.exists())
        free = shutil.disk_usage(parent).free
        raise FormatError(
            f"{folder}: found {free / 1e6:.0f} MB free on the disk; needed about {needed / 1e6:.0f} MB; "
            "free some space or use another --output_dir"
        ) from error
