"""Rows with images: what is kept, cut and filled up, and what comes of chats that name files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from autoround.data.images import Made, completed, made, shortened
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
