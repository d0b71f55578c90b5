"""Local files and their records."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from autoround.data.files import SECTION_CHARS, find_files, read_file
from autoround.data.records import Document, read_record
from autoround.errors import DataError

USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}


@pytest.mark.parametrize(
    ("record", "document"),
    [
        ("plain", "plain"),
        ({"text": "a", "id": 1, "url": "u"}, "a"),
        ({"content": "a", "title": "t"}, "a"),
        ({"text": None}, ""),
        ({"abstract": "a", "id": 3}, "a"),
        ({"abstract": None}, ""),
        ({"messages": [USER, ANSWER], "prompt": "x"}, [USER, ANSWER]),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}, [USER, ANSWER]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]}, [USER]),
        ({"messages": [{"role": "assistant", "content": None}]}, [{"role": "assistant", "content": ""}]),
        ({"instruction": "Why", "input": "", "output": "Because."}, [{**USER, "content": "Why"}, ANSWER]),
        ({"instruction": "Why", "input": "now", "output": "Because."}, [{**USER, "content": "Why\n\nnow"}, ANSWER]),
        ({"instruction": "Why", "context": "now", "response": "Because."}, [{**USER, "content": "Why\n\nnow"}, ANSWER]),
        ({"question": "Why?", "answer": "Because."}, [USER, ANSWER]),
    ],
)
def test_records(record: object, document: Document) -> None:
    assert read_record(record, where="f, row 1") == document


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"a": "x", "b": "y"}, "f, row 1: found keys 'a', 'b'; understood: a string, a text in text, .*column=KEY"),
        ({"input_ids": [1, 2]}, "found keys 'input_ids'"),
        ({}, "found keys none"),
        (7, "found a value of type int"),
        (None, "found null"),
        ({"messages": ["x"]}, "'messages' message 1: found a value of type str"),
        ({"messages": [{"role": "user"}, {"who": "x"}]}, "message 2: found keys 'who'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content that is neither text nor an image"),
    ],
)
def test_records_without_text(record: object, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_record(record, where="f, row 1")


def test_column_names_the_key() -> None:
    record = {"text": "a", "body": "b", "chat": [USER], "n": 3}
    assert read_record(record, where="f", column="body") == "b"
    assert read_record(record, where="f", column="chat") == [USER]
    with pytest.raises(DataError, match=r"needed 'bdy'.*did you mean 'body'"):
        read_record(record, where="f", column="bdy")
    with pytest.raises(DataError, match="type int in 'n'"):
        read_record(record, where="f", column="n")


TEXTS = ["one, two", 'three "four"\nfive', "déjà vu"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same three texts in every format."""
    table = pa.table({"id": [1, 2, 3], "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    pyarrow.csv.write_csv(table, tmp_path / "t.csv")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "t.jsonl").write_text("\ufeff" + lines + "\n", encoding="utf-8")
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    (tmp_path / "values.json").write_text(json.dumps(dict(enumerate(TEXTS))), encoding="utf-8")
    (tmp_path / "data.json").write_text(json.dumps({"version": 1, "data": TEXTS}, indent=1), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["t.parquet", "t.csv", "t.jsonl", "lines.json", "list.json", "values.json", "data.json"]
)
def test_formats(folder: Path, name: str) -> None:
    assert list(read_file(folder / name)) == TEXTS


def test_one_record_in_a_json_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"title": "t", "text": "x"}))
    assert list(read_file(tmp_path / "a.json")) == ["x"]


def test_plain_text_is_one_document_or_sections_without_loss(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short\n")
    assert list(read_file(tmp_path / "a.txt")) == ["short\n"]
    long = "\n\n".join(f"paragraph {index} " + "word " * 60 for index in range(200)) + "x" * 40_000
    (tmp_path / "b.md").write_text(long)
    sections = list(read_file(tmp_path / "b.md"))
    assert "".join(map(str, sections)) == long
    assert len(sections) > 4
    assert max(map(len, sections)) <= SECTION_CHARS


def test_folders_and_globs(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "z.txt").write_text("z")
    (folder / ".hidden.txt").write_text("no")
    (folder / "weights.bin").write_bytes(b"no")
    assert len(find_files(str(folder))) == 8
    assert [path.name for path in find_files(str(folder / "*.json"))] == [
        "data.json", "lines.json", "list.json", "values.json",
    ]  # fmt: skip
    assert find_files(str(folder / "none.jsonl")) == []
    assert find_files("org/name") == []


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("a,b\n1,2,3\n")
    for name, says in {
        "a.jsonl": "a.jsonl, line 2: found invalid JSON",
        "a.parquet": "damaged parquet",
        "latin.txt": "not UTF-8",
        "a.docx": "found suffix '.docx'; needed one of .jsonl",
        "a.csv": "invalid CSV",
    }.items():
        with pytest.raises(DataError, match=says):
            list(read_file(tmp_path / name))
    with pytest.raises(DataError, match="empty: found no data file"):
        find_files(str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"a \.txt file has no columns"):
        list(read_file(tmp_path / "latin.txt", column="text"))


def test_the_error_names_file_and_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"a": "x", "b": "y"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: found keys 'a', 'b'"):
        list(read_file(tmp_path / "a.jsonl"))
