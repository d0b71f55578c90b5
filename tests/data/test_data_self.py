"""The source ``self``: rows that the model writes."""

from pathlib import Path

import pytest
import torch

from autoround.data.sources import held_out
from autoround.errors import AutoRoundError, DataError
from autoround.model.load import open_model
from autoround.model.sample import Sampler
from tests.data.words import BOS, EOS, StubWriter, load, make_tokenizer, words, write_records
from tests.model.tiny import make

SPECIAL = {"<unk>", "</s>"}


def test_rows_are_written_by_the_model_as_often_as_asked() -> None:
    writer = StubWriter(1007)
    data = load("self:num=2,self,self:num=1", make_tokenizer(), nsamples=6, writer=writer)
    assert data.tokens_NT.shape == (6, 16)
    assert bool(data.valid_NT.all())
    assert [source.rows for source in data.report.sources] == [2, 3, 1]
    assert {source.origin for source in data.report.sources} == {"written by the model itself"}
    assert [seed for *_, seed in writer.asked] == ["7:0", "7:1", "7:2"]


def test_documents_begin_with_any_token_but_special_ones_or_with_bos() -> None:
    tokenizer, writer = make_tokenizer(), StubWriter(500)
    load("self", tokenizer, writer=writer)
    known = {id for word, id in tokenizer.get_vocab().items() if word not in SPECIAL and id < 500}
    assert writer.asked == [((), sorted(known), (EOS,), "7:0")]
    writer = StubWriter(1007)
    data = load("self", make_tokenizer(bos=True, eos=False), writer=writer)
    assert writer.asked == [((BOS,), (), (), "7:0")]
    assert bool((data.tokens_NT[:, 0] == BOS).all())


def test_a_tiny_model_writes_rows_beside_a_file(tmp_path: Path) -> None:
    name = write_records(tmp_path / "a.jsonl", "text", [words(100)])
    tokenizer, opened = make_tokenizer(), open_model(make("llama", vocab_size=1007))
    both = [load(f"self:num=3,{name}", tokenizer, nsamples=5, writer=Sampler(opened)) for _ in range(2)]
    assert torch.equal(both[0].tokens_NT, both[1].tokens_NT)
    assert [source.rows for source in both[0].report.sources] == [3, 2]
    assert bool((both[0].tokens_NT < 1007).all())


@pytest.mark.parametrize(
    "option", ["split=train", "concat", "concat=no", "apply_chat_template", "system_prompt=x", "config=a", "column=b"]
)
def test_other_options_are_refused(option: str) -> None:
    with pytest.raises(DataError, match=f"found {option.partition('=')[0]}=; .*num= alone"):
        load(f"self:{option}", make_tokenizer(), writer=StubWriter(1007))


def test_without_a_model_there_is_no_text_of_its_own() -> None:
    with pytest.raises(DataError, match="found no model to write the text; needed one; give python-docs or a file"):
        load("self", make_tokenizer())
    with pytest.raises(DataError, match="found text that a model writes"):
        held_out("self")


def test_a_file_of_that_name_is_still_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "self").mkdir()
    write_records(tmp_path / "self" / "a.jsonl", "text", [words(100)])
    monkeypatch.chdir(tmp_path)
    assert load("./self", make_tokenizer()).report.sources[0].origin == "self/a.jsonl"
    with pytest.raises(AutoRoundError, match="no model"):
        load("self", make_tokenizer())
