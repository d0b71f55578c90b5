"""Data that is empty, binary, unreadable, without text or with too little of it: one message of one line each."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from autoround.errors import DataError
from tests.data.words import load, make_tokenizer, words, write_records
from tests.refusals import says

CASES: dict[str, tuple[bytes, str]] = {
    "empty.txt": (b"", "found no documents; needed some text"),
    "empty.jsonl": (b"", "found no documents"),
    "empty.json": (b"", "found no documents"),
    "empty.csv": (b"", "found no documents"),
    "empty.parquet": (b"", "found no documents"),
    "list.json": (b"[]", "found no documents"),
    "head.csv": (b"id,text\n", "found no documents"),
    "blank.txt": (b" \n\n \n", "found no text in 1 documents; needed some"),
    "nulls.jsonl": (b'{"text": null}\n{"text": ""}\n', "found no text in 2 documents"),
    "program.txt": (b"\x7fELF\x02\x01\x01\0\0\0\0", "found binary data; needed text in UTF-8"),
    "wide.md": ("déjà vu".encode("utf-16"), "found binary data; needed text in UTF-8"),
    "image.jsonl": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "found binary data"),
    "latin.txt": ("déjà vu".encode("latin-1"), "found bytes that are not UTF-8"),
    "latin.csv": ("id,text\n1,déjà vu\n".encode("latin-1"), "found bytes that are not UTF-8 in column 'text'"),
    "broken.parquet": (b"PAR1 and no more", "found a damaged parquet file"),
    "columns.csv": (b"id,label,place\n1,x,y\n", "row 1: found keys 'id', 'label', 'place'; understood: "),
    "numbers.jsonl": (b'{"id": 1, "input_ids": [1, 2]}\n', "row 1: found keys 'id', 'input_ids'; understood: "),
    "one.jsonl": (b'{"text": "w1 w2"}\n', "found 3 tokens; needed 8, a quarter of a row; give more text"),
    "text.gz": (b"\x1f\x8b\x08\0", "found suffix '.gz'; needed one of .jsonl"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_message(name: str, tmp_path: Path) -> None:
    content, message = CASES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as found:
        load(f'"{tmp_path / name}"', make_tokenizer(), seqlen=32)
    assert says(str(found.value), name, message)


def test_a_table_without_rows_or_text(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    pyarrow.parquet.write_table(pa.table({"id": [1], "place": [2]}), tmp_path / "ids.parquet")
    with pytest.raises(DataError, match="found no documents"):
        load(str(tmp_path / "none.parquet"), make_tokenizer())
    with pytest.raises(DataError, match="row 1: found keys 'id', 'place'; understood: .*column=KEY"):
        load(str(tmp_path / "ids.parquet"), make_tokenizer())


def test_one_row_of_enough_text_is_taken_and_of_too_little_is_told(tmp_path: Path) -> None:
    name = write_records(tmp_path / "one.jsonl", "text", [words(100)])
    assert load(name, make_tokenizer(), nsamples=4).report.rows == 4
    with pytest.raises(DataError, match="found 7 of 8 rows of 16 tokens.*needed 8, one batch; give more text"):
        load(name, make_tokenizer(), nsamples=8, batch_size=8)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(words(100))

    def refuse(*words: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "a.txt"))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.txt: found a file that cannot be read \(Permission denied\)"):
        load(str(tmp_path / "a.txt"), make_tokenizer())


def test_an_item_without_a_row_is_an_error_beside_others_too(tmp_path: Path) -> None:
    good = write_records(tmp_path / "good.jsonl", "text", [words(100)])
    empty = write_records(tmp_path / "empty.jsonl", "text", [""])
    with pytest.raises(DataError, match=r"empty\.jsonl': found no text in 1 documents"):
        load(f"{good},{empty}", make_tokenizer())


def test_damage_far_inside_a_file_is_found(tmp_path: Path) -> None:
    lines = [json.dumps({"text": words(5)})] * 2000
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe")
    with pytest.raises(DataError, match="bytes that are not UTF-8"):
        load(str(tmp_path / "a.jsonl"), make_tokenizer(), nsamples=2000)
