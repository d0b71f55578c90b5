"""Local files -> documents: .jsonl .json .txt .md .parquet .csv, folders and globs of them. Torch-free."""

import glob
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from autoround.data.records import CHAT_KEYS, TEXT_KEYS, Document, read_record
from autoround.errors import DataError

SECTION_CHARS = 16_384
"""Longest document cut from a plain text file; longer texts are split, at blank lines where there are any."""
_SNIFFED = 8192


def find_files(name: str) -> list[Path]:
    """Return the data files that a file, folder or glob stands for, sorted; empty if nothing of that name exists.

    Raises:
        DataError: the path exists but holds no file of a known kind.
    """
    path = Path(name).expanduser()
    if path.is_file():
        _reader(path)
        return [path]
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file.relative_to(path))]
    else:
        found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
    known = [file for file in found if file.suffix.lower() in READERS]
    if not known and (found or path.is_dir()):
        raise DataError(f"{name}: found no data file; needed one or more of {', '.join(READERS)}")
    return known


def looks_like_path(name: str) -> bool:
    """Whether a name that is no existing file was still meant as one."""
    suffix = Path(name).suffix.lower()
    return suffix in READERS or name.startswith((".", "/", "~")) or any(char in name for char in "\\*?[:")


def read_file(path: Path, *, column: str | None = None) -> Iterator[Document]:
    """Yield the documents of one file in order.

    Args:
        path: an existing file with a suffix in ``READERS``.
        column: the key or column that holds the text; None looks for the known ones.

    Raises:
        DataError: the file is damaged, binary, not UTF-8, may not be read, or a record holds no document.
    """
    reader = _reader(path)
    if column is not None and reader is _read_text:
        raise DataError(f"{path}: found column={column}; a {path.suffix} file has no columns; drop the option")
    try:
        if reader is not _read_parquet and b"\0" in _first_bytes(path):
            raise DataError(f"{path}: found binary data; needed text in UTF-8; convert it, or give another file")
        if path.stat().st_size:
            for row, record in enumerate(reader(path), 1):
                yield read_record(record, where=f"{path}, row {row}", column=column, folder=path.parent)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: found bytes that are not UTF-8 ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(
            f"{path}: found a file that cannot be read ({error.strerror or error}); check the disk and its permissions"
        ) from error


def _reader(path: Path) -> Callable[[Path], Iterator[object]]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: found suffix {path.suffix!r}; needed one of {', '.join(READERS)}")
    return reader


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_SNIFFED)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_jsonl(path: Path) -> Iterator[object]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parse_json(line, where=f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[object]:
    text = path.read_text(encoding="utf-8-sig")
    first = text.lstrip().partition("\n")[0]
    if first.startswith("{") and first.rstrip().endswith("}") and len(first) < len(text.strip()):
        yield from _read_jsonl(path)
    else:
        yield from _json_records(_parse_json(text, where=str(path)))


def _parse_json(text: str, *, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: found invalid JSON ({error.msg}, line {error.lineno} column {error.colno}); "
            "needed a list of records in .json, one record a line in .jsonl"
        ) from error


def _json_records(content: object) -> list[object]:
    """A list as it is; of an object its only list, else itself if it is a record, else its values."""
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        return [content]
    if any(isinstance(content.get(key), str) for key in TEXT_KEYS) or any(key in content for key in CHAT_KEYS):
        return [content]
    lists = [value for value in content.values() if isinstance(value, list)]
    return lists[0] if len(lists) == 1 else list(content.values())


def _read_text(path: Path) -> Iterator[object]:
    return _sections(path.read_text(encoding="utf-8-sig"))


def _sections(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > SECTION_CHARS:
        middle, limit = start + SECTION_CHARS // 2, start + SECTION_CHARS
        cuts = (text.rfind(mark, middle, limit) for mark in ("\n\n", "\n", " "))
        end = next((cut for cut in cuts if cut >= 0), limit)
        yield text[start:end]
        start = end
    yield text[start:]


def _read_parquet(path: Path) -> Iterator[object]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise DataError(
            f"{path}: found a damaged parquet file ({_first_line(error)}); write or download it again"
        ) from error


def _read_csv(path: Path) -> Iterator[object]:
    import pyarrow as pa
    import pyarrow.csv as pc

    # one block, since a row of text may be longer than the default block
    options = pc.ReadOptions(block_size=min(max(path.stat().st_size, 1 << 20), (1 << 31) - 1))
    try:
        table = pc.read_csv(path, read_options=options, parse_options=pc.ParseOptions(newlines_in_values=True))
    except pa.ArrowException as error:
        raise DataError(f"{path}: found invalid CSV ({_first_line(error)}); needed a header line and UTF-8") from error
    if wrong := [column.name for column in table.schema if pa.types.is_binary(column.type)]:
        raise DataError(f"{path}: found bytes that are not UTF-8 in column {wrong[0]!r}; save it as UTF-8")
    for batch in table.to_batches(max_chunksize=256):
        yield from batch.to_pylist()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


READERS: Mapping[str, Callable[[Path], Iterator[object]]] = MappingProxyType(
    {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".txt": _read_text,
        ".md": _read_text,
        ".parquet": _read_parquet,
        ".csv": _read_csv,
    }
)
