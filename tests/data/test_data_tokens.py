"""Texts to token rows: packing, masks, shares, seeds and refusals."""

from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoround.data.encode import Specials
from autoround.data.language import DatasetSpec
from autoround.data.packing import RowRequest, pack_rows, row_per_document
from autoround.data.sources import held_out
from autoround.data.tokens import Dataset, load_calibration, share_rows
from autoround.errors import AutoRoundError, DataError, UsageError
from tests.data.words import BOS, EOS, TEMPLATE, StubWriter, load, make_tokenizer, words, write_records

DOCUMENTS = st.lists(st.lists(st.integers(10, 99), max_size=30), max_size=30)
PREFIXES = st.sampled_from([(), (BOS,), (BOS, 5)])


@given(DOCUMENTS, st.integers(1, 8), st.integers(4, 20), PREFIXES)
def test_packing_loses_nothing_but_a_short_tail(
    documents: list[list[int]], rows: int, seqlen: int, prefix: tuple[int, ...]
) -> None:
    specials = Specials(prefix, (EOS,), EOS, EOS)
    stream = list(chain.from_iterable([*ids, EOS] for ids in documents if ids))
    packed, report = pack_rows(documents, RowRequest("x", rows, seqlen), specials=specials)
    assert all(tuple(row[: len(prefix)]) == prefix and BOS not in row[len(prefix) :] for row in packed)
    body = list(chain.from_iterable(row[len(prefix) :] for row in packed))
    assert body == stream[: len(body)]
    assert all(len(row) == seqlen for row in packed[:-1])
    if len(packed) < rows:
        assert len(stream) - len(body) == report.tokens_cut < seqlen // 4
    assert report.kept + sum(count for _, count in report.dropped) == report.documents
    assert (report.rows, report.tokens) == (len(packed), sum(map(len, packed)))
    assert len(packed) <= rows


@given(DOCUMENTS, st.integers(1, 8), st.integers(4, 20), PREFIXES)
def test_a_document_a_row(documents: list[list[int]], rows: int, seqlen: int, prefix: tuple[int, ...]) -> None:
    made, report = row_per_document(documents, RowRequest("x", rows, seqlen), prefix=prefix)
    expected = [[*prefix, *ids] for ids in documents if ids][:rows]
    assert made == [row[:seqlen] for row in expected]
    assert report.tokens + report.tokens_cut == sum(map(len, expected))
    assert report.kept == report.rows == len(made)


def test_short_texts_are_packed_with_eos_between() -> None:
    data = load([words(3, 10 * index) for index in range(16)], make_tokenizer(), nsamples=4)
    assert data.tokens_NT.dtype == torch.int64
    assert data.valid_NT.dtype == torch.bool
    assert data.tokens_NT.shape == data.valid_NT.shape == (4, 16)
    assert int((data.tokens_NT == EOS).sum()) == 16
    assert len(set(data.tokens_NT[data.tokens_NT != EOS].tolist())) == 48
    assert data.report.sources[0].kept == 16


def test_without_eos_documents_are_still_separate_rows_of_text() -> None:
    data = load([words(8)] * 4, make_tokenizer(eos=False), nsamples=2)
    assert bool(data.valid_NT.all())


def test_concat_false_pads_and_masks(tmp_path: Path) -> None:
    name = write_records(tmp_path / "a.jsonl", "text", [words(5), words(40), "", "  \n", None])
    data = load(f"{name}:concat=False", make_tokenizer(bos=True), nsamples=2)
    lengths = sorted(data.valid_NT.sum(dim=1).tolist())
    assert lengths == [6, 16]
    assert bool((data.tokens_NT[~data.valid_NT] == EOS).all())
    assert bool((data.tokens_NT[:, 0] == BOS).all())
    assert data.report.sources[0].tokens_cut == 25


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    name = write_records(tmp_path / "a.jsonl", "text", ["", words(31), None])
    source = load(name, make_tokenizer(), nsamples=2).report.sources[0]
    assert (source.documents, source.kept) in {(1, 1), (2, 1), (3, 1)}
    assert source.documents - source.kept == sum(count for _, count in source.dropped)


def test_a_tail_of_a_quarter_row_is_kept_and_less_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    for tail, rows in ((4, 2), (3, 1)):
        data = load([words(16 + tail - 1)], make_tokenizer(), nsamples=3)
        assert len(data.tokens_NT) == rows
        assert data.report.sources[0].tokens_cut == (0 if rows == 2 else tail)
    told = "calibration data: 2 of 3 rows of 16 tokens (a list of 1 texts: 2 of 3 rows, 20 tokens"
    assert caplog.messages[0].startswith(told)
    caplog.clear()


def test_less_than_a_batch_is_an_error() -> None:
    with pytest.raises(DataError, match=r"found 1 of 4 rows of 16 tokens.*needed 2, one batch"):
        load([words(16)], make_tokenizer(), batch_size=2)
    assert len(load([words(16)], make_tokenizer(), nsamples=1, batch_size=8).tokens_NT) == 1


def test_seeds(tmp_path: Path) -> None:
    name = write_records(tmp_path / "a.jsonl", "text", [words(20, 20 * index) for index in range(40)])

    def rows(seed: int) -> torch.Tensor:
        return load_calibration(name, make_tokenizer(), nsamples=8, seqlen=16, batch_size=1, seed=seed).tokens_NT

    assert torch.equal(rows(1), rows(1))
    assert not torch.equal(rows(1), rows(2))


def test_items_share_rows_and_one_set_may_come_twice(tmp_path: Path) -> None:
    name = write_records(tmp_path / "a.jsonl", "text", [words(20)] * 40)
    other = write_records(tmp_path / "b.jsonl", "text", [words(20, 500)] * 40)
    data = load(f"{name}:num=3,{other},{name}:num=2:concat=False,{other}", make_tokenizer(), nsamples=12)
    assert [source.rows for source in data.report.sources] == [3, 4, 2, 3]
    assert data.report.rows == len(data.tokens_NT) == 12
    assert data.report.tokens == int(data.valid_NT.sum())


@pytest.mark.parametrize(
    ("nums", "nsamples", "shares"),
    [
        ([None], 5, [5]),
        ([None, None, None], 10, [4, 3, 3]),
        ([2, None, None], 7, [2, 3, 2]),
        ([2, 3], 9, [2, 3]),
        ([5], 5, [5]),
    ],
)
def test_shares(nums: list[int | None], nsamples: int, shares: list[int]) -> None:
    assert share_rows(nums, nsamples) == shares


def test_shares_beyond_nsamples_are_scaled_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert share_rows([256, 128], 128) == [85, 43]
    assert caplog.messages == ["dataset: num= asks for 384 rows, nsamples is 128; taking 85 + 43"]
    caplog.clear()


@pytest.mark.parametrize(("nums", "nsamples"), [([8, None], 8), ([None, None, None], 2), ([100, 1], 1)])
def test_every_item_gives_a_row(nums: list[int | None], nsamples: int) -> None:
    with pytest.raises(UsageError, match="at least one row for each"):
        share_rows(nums, nsamples)


class TestPythonData:
    """Datasets that are Python objects."""

    def test_rows_of_ids(self) -> None:
        tokenizer = make_tokenizer()
        ids = [list(range(7, 7 + size)) for size in (5, 9, 12)]
        expected = sorted(ids)
        for dataset in (ids, [torch.tensor(row) for row in ids], [torch.tensor([row]) for row in ids]):
            data = load(dataset, tokenizer, nsamples=3)
            assert data.tokens_NT.shape == (3, 12)
            assert sorted(row[valid].tolist() for row, valid in zip(*data[:2], strict=True)) == expected
        tensor = torch.arange(7, 47).reshape(4, 10)
        data = load(tensor, tokenizer)
        assert torch.equal(data.tokens_NT.sort(dim=0).values, tensor)
        assert bool(data.valid_NT.all())

    def test_rows_beyond_seqlen_are_cut_with_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        assert load([list(range(20))], make_tokenizer(), nsamples=1).tokens_NT.tolist() == [list(range(16))]
        assert caplog.messages == ["dataset: 4 token ids lie beyond seqlen 16 and are cut off"]
        caplog.clear()

    def test_specs_chats_and_records(self, tmp_path: Path) -> None:
        tokenizer = make_tokenizer(chat_template=TEMPLATE)
        write_records(tmp_path / "a.jsonl", "text", [words(100)])
        assert load([DatasetSpec(name=str(tmp_path / "a.jsonl"))], tokenizer).report.rows == 4
        mixed = [words(40), {"text": words(40)}, [{"role": "user", "content": words(40)}]]
        assert load(mixed, tokenizer).report.rows == 4

    @pytest.mark.parametrize(
        ("dataset", "says"),
        [
            ([], "empty sequence"),
            ([[1, 2], [3, 1007]], "row 1: found token id 1007; needed 0 to 1006"),
            ([[1, -1]], "row 0: found token id -1"),
            (torch.zeros(3, dtype=torch.int64), "shape .3.; needed .rows, tokens."),
            ([torch.zeros(3)], "found torch.float32"),
            ([[1, 2], "text"], r"dataset\[1\]: found str"),
            (["text", 3], r"dataset\[1\]: found a value of type int"),
            ([{"a": "x", "b": "y"}], r"dataset\[0\]: found keys 'a', 'b'"),
        ],
    )
    def test_refusals(self, dataset: Dataset, says: str) -> None:
        with pytest.raises(DataError, match=says):
            load(dataset, make_tokenizer())

    def test_the_vocabulary_of_the_model(self) -> None:
        with pytest.raises(DataError, match="found token id 9; needed 0 to 8"):
            load([words(9)], make_tokenizer(), nsamples=1, seqlen=4, writer=StubWriter(9))
        assert load([[2000]], make_tokenizer(), nsamples=1, seqlen=4, writer=StubWriter(2001)).report.rows == 1


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        ("./none.jsonl", "no such file.*--dataset python-docs or a local file"),
        ("none/*.txt", "no such file"),
        ("a name", "neither a file of that name nor a hub name"),
        ("python-docs:split=dev", "found split 'dev'; needed train or test"),
        ("python-docs:column=text", "found column=; only hub datasets have it"),
        ("a:b=c", "unknown option"),
    ],
)
def test_sources_that_cannot_be_read(dataset: str, says: str) -> None:
    with pytest.raises(AutoRoundError, match=says):
        load(dataset, make_tokenizer())


def test_options_a_local_file_does_not_have_are_refused(tmp_path: Path) -> None:
    name = write_records(tmp_path / "a.jsonl", "text", [words(100)])
    for option in ("split=train", "config=en"):
        with pytest.raises(DataError, match="only hub datasets have it; drop the option"):
            load(f"{name}:{option}", make_tokenizer())


def test_python_docs() -> None:
    data = load("python-docs", make_tokenizer(bos=True), nsamples=16, seqlen=128, batch_size=8)
    assert data.tokens_NT.shape == (16, 128)
    train, test = (held_out(f"python-docs:split={split}") for split in ("train", "test"))
    assert held_out() == test
    assert len(train) > 1000
    assert sum(map(len, train)) > 1_000_000
    assert sum(map(len, test)) > 100_000
    known = {" ".join(paragraph.split()) for text in train for paragraph in text.split("\n\n")}
    assert not any(" ".join(paragraph.split()) in known for text in test for paragraph in text.split("\n\n"))
    both = held_out("python-docs:split=train+test")
    assert both == train + test
    assert any("The ``if`` statement" in text or 'The "if" statement' in text for text in both)


def test_held_out_text_is_local() -> None:
    with pytest.raises(DataError, match="found a hub name"):
        held_out("org/name")
