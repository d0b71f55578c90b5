"""Rows with images: what is kept, cut and filled up, and what comes of chats that name files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from autoround.data.images import Made, completed, made, rows_with_images, shortened
from autoround.data.language import DatasetSpec
from autoround.data.packing import RowRequest
from autoround.data.records import Pictured, plain_text, read_record
from autoround.data.tokens import load_calibration
from autoround.errors import DataError
from autoround.model.media import Media

IMAGE = {"type": "image", "path": "a.png"}
TEXT = {"type": "text", "text": "what?"}


def _chat(*parts: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "a cat"}]}


def test_parts_keep_their_order_and_paths_begin_at_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    found = read_record(
        _chat(TEXT, IMAGE, "and", {"type": "image", "image": "a.png"}), where="f, row 1", folder=tmp_path
    )
    assert isinstance(found, Pictured)
    assert found.where == "f, row 1, 'messages'"
    file = tmp_path / "a.png"
    assert found.messages == (("user", ("what?", file, "and", file)), ("assistant", ("a cat",)))
    assert plain_text(found) == "what?and\n\na cat"
    assert read_record(_chat(TEXT, "!"), where="f")[0] == {"role": "user", "content": "what?!"}


@pytest.mark.parametrize("part", [{"type": "image"}, {"type": "video", "path": 3}, 7])
def test_other_parts_are_refused(part: object) -> None:
    with pytest.raises(DataError, match="message 1: found content that is neither text nor an image"):
        read_record(_chat(part), where="f, row 1")


SHOWN = {"type": "image", "text": None}
ANSWER = {"from": "gpt", "value": "a cat"}


@pytest.mark.parametrize(
    ("record", "first"),
    [
        ({"images": [b"1", b"2"], **_chat(SHOWN, TEXT, SHOWN)}, (b"1", "what?", b"2")),
        ({"image": {"bytes": b"1", "path": "gone.png"}, **_chat(TEXT)}, (b"1", "what?")),
        ({"images": [{"bytes": b"1", "path": None}], "question": "what?", "answer": "a cat"}, (b"1", "what?")),
        ({"image": b"1", "text": "a cat"}, (b"1", "a cat")),
        ({"image": b"1", "text": None}, (b"1",)),
        ({"image": b"1", "conversations": [{"from": "human", "value": "<image>\nwhat?"}, ANSWER]}, (b"1", "what?")),
        ({"image": b"1", "conversations": [{"from": "human", "value": "what? <image>"}, ANSWER]}, ("what? ", b"1")),
        ({"text": "<image>", "image": None}, None),
        ({"text": "what?", "image": "a name.png"}, None),
        ({"text": "what?", "image": [0.5, 1.0]}, None),
        (_chat({"type": "image", "image": {"bytes": b"1", "path": None}}, TEXT), (b"1", "what?")),
    ],
)
def test_images_of_columns_go_where_messages_show_them(
    record: dict[str, Any], first: tuple[object, ...] | None
) -> None:
    found = read_record(record, where="f, row 1")
    if first is None:
        assert found == record["text"]
        return
    assert isinstance(found, Pictured)
    assert found.messages[0] == ("user", first)
    assert found.images == sum(not isinstance(part, str) for part in first)
    assert [role for role, _ in found.messages[1:]] == ["assistant"] * (len(found.messages) - 1)


def test_names_in_columns_are_files_where_messages_show_them(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    record = {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>what?"}]}
    found = read_record(record, where="f, row 1", folder=tmp_path)
    assert isinstance(found, Pictured)
    assert found.messages == (("user", (tmp_path / "a.png", "what?")),)
    with pytest.raises(DataError, match=r"f, row 1: found no image a\.png in .*; needed a file, or its bytes"):
        read_record(record, where="f, row 1")


def test_a_named_column_is_read_alone() -> None:
    record = {"image": b"1", "caption": "a cat", "other": "a dog", **_chat(TEXT)}
    assert read_record(record, where="f", column="caption") == "a cat"
    assert read_record(record, where="f", column="messages") == read_record(_chat(TEXT), where="f")
    shown = read_record({**record, **_chat(SHOWN)}, where="f", column="messages")
    assert isinstance(shown, Pictured)
    assert shown.messages[0] == ("user", (b"1",))


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"images": [b"1"], **_chat(SHOWN, SHOWN)}, "f, row 1: found 1 images and more places for them"),
        ({"images": [b"1", b"2"], **_chat(SHOWN)}, "f, row 1: found 2 images and 1 places for them"),
        ({"images": [b"1"], "messages": [{"role": "system", "content": "x"}]}, "found images and no message of a user"),
        (_chat(SHOWN), "message 1: found content that is neither text nor an image"),
    ],
)
def test_images_and_places_that_do_not_match(record: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_record(record, where="f, row 1")


class _Sizes:
    """A processor whose rows have a token for each column of pixels and for each word, and which shows no more."""

    chat_template = "there is one"

    def apply_chat_template(self, messages: list[dict[str, Any]], **settings: object) -> dict[str, torch.Tensor]:
        ids: list[int] = []
        for part in (part for message in messages for part in message["content"]):
            ids += [9] * part["image"].width if part["type"] == "image" else [7] * len(part["text"].split())
        return {"input_ids": torch.tensor([ids])}


def _rows(documents: list[Any], seqlen: int) -> tuple[list[Made], Any]:
    return rows_with_images(documents, RowRequest("d", 8, seqlen), _Sizes(), spec=DatasetSpec(name="d"))  # type: ignore[arg-type]


def test_rows_that_images_make_too_long_are_dropped_and_told(caplog: pytest.LogCaptureFixture) -> None:
    sizes = (4, 30, 3, 20)
    documents = [read_record({"image": Image.new("L", (size, 2)), "text": "a cat"}, where="f") for size in sizes]
    rows, report = _rows([*documents, "w " * 30], 10)
    assert [len(row.ids) for row in rows] == [6, 5, 10]
    assert (report.images, report.documents, report.kept, report.tokens_cut) == (2, 5, 3, 54)
    assert str(report) == (
        "d: 3 of 8 rows, 21 tokens, 2 images from 3 documents, 2 dropped (longer than seqlen, with images), "
        "54 tokens cut off"
    )
    assert caplog.messages == [
        "dataset 'd': dropped 2 of 5 rows, whose images make them longer than 10 tokens; raise seqlen, 32 suffices, or "
        "lower the size of images in preprocessor_config.json"
    ]
    caplog.clear()
    with pytest.raises(DataError, match="found 2 rows with images, all longer than 10 tokens; .* 32 suffices"):
        _rows(documents[1::2], 10)


def test_images_are_opened_from_wherever_they_are(tmp_path: Path) -> None:
    Image.new("RGB", (5, 2)).save(file := tmp_path / "a.png")
    for content in (file.read_bytes(), Image.open(file), {"path": str(file), "bytes": None}):
        ((row,), _) = _rows([read_record({"image": content, "text": "a cat"}, where="f")], 10)
        assert row.ids == [9] * 5 + [7] * 2
    with pytest.raises(DataError, match=r"f: found an image that cannot be read \(.*\); replace it"):
        _rows([read_record({"image": b"none", "text": "a cat"}, where="f")], 10)


def _row(tokens: int, **extras: torch.Tensor) -> Made:
    return Made(list(range(tokens)), extras)


def test_what_goes_by_tokens_is_cut_and_filled_up_with_them() -> None:
    rows = [_row(5, kinds=torch.ones(1, 5), pixels=torch.ones(2, 3)), _row(2), _row(4, kinds=torch.ones(1, 4))]
    rows = [shortened(row, 4) for row in rows]
    assert [len(row.ids) for row in rows] == [4, 2, 4]
    first, second, third = completed(rows, 6)
    assert first["kinds"].tolist() == [[1, 1, 1, 1, 0, 0]] == third["kinds"].tolist()
    assert second["kinds"].tolist() == [[0] * 6]
    assert "pixels" not in second
    assert Media([first, second, third]).take(torch.tensor([1, 0]))["pixels"].shape == (2, 3)


def test_rows_are_aligned_where_tokens_are_told_their_images() -> None:
    """As Mllama's: a row without images gets zeros in their place."""
    seen = _row(3, seen=torch.ones(1, 3, 2, 4), pixels=torch.ones(1, 2, 4, 5))
    own = completed([seen, _row(3), _row(2, seen=torch.ones(1, 2, 1, 4), pixels=torch.ones(1, 1, 4, 5))], 3)
    taken = Media(own).take(torch.tensor([0, 1, 2]))
    assert taken["pixels"].shape == (3, 2, 4, 5)
    assert taken["seen"].shape == (3, 3, 2, 4)
    assert taken["pixels"].flatten(1).sum(1).tolist() == [40, 0, 20]
    assert taken["seen"].flatten(1).sum(1).tolist() == [24, 0, 8]


def test_rows_without_images_have_nothing_beside_tokens() -> None:
    assert completed([_row(3), _row(2)], 3) == ()


def test_rows_and_what_comes_beside_them_are_shuffled_together() -> None:
    dataset = [{"input_ids": torch.full((1, 4), row), "pixels": torch.full((1, 2), row)} for row in range(6)]
    found = load_calibration(dataset, None, nsamples=6, seqlen=4, batch_size=2, seed=3)
    assert found.tokens_NT[:, 0].tolist() == [int(own["pixels"][0, 0]) for own in found.extras] != list(range(6))
    names = [name for name, _ in found.tensors()]
    assert names == ["tokens", "valid", *(f"{row}.pixels" for row in range(6))]


@pytest.mark.parametrize("ids", [None, torch.ones(3), torch.ones(2, 3)])
def test_processed_rows_hold_one_row_each(ids: torch.Tensor | None) -> None:
    with pytest.raises(
        DataError, match=r"dataset\[0\]: found (no tensor input_ids|input_ids of shape .*); needed \[1, to"
    ):
        made({} if ids is None else {"input_ids": ids}, "dataset[0]")


def test_processed_rows_are_not_cut_through_their_images(caplog: pytest.LogCaptureFixture) -> None:
    long = {"input_ids": torch.ones(1, 6, dtype=torch.int64), "kinds": torch.ones(1, 6)}
    short = {"input_ids": torch.ones(1, 4, dtype=torch.int64), "pixels": torch.ones(2, 2)}
    found = load_calibration([long, short, {**long, "pixels": torch.ones(2, 2)}], None,
                             nsamples=2, seqlen=5, batch_size=1, seed=3)  # fmt: skip
    assert sorted(found.valid_NT.sum(1).tolist()) == [4, 5]
    told, cut = caplog.messages
    assert "dropped 1 of 3 rows, whose images make them longer than 5 tokens; raise seqlen, 6 suffices" in told
    assert "1 token ids lie beyond seqlen 5" in cut
    caplog.clear()
    with pytest.raises(DataError, match="found 1 rows with images, all longer than 3 tokens"):
        load_calibration([short], None, nsamples=1, seqlen=3, batch_size=1, seed=3)
