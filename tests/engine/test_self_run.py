"""Runs that calibrate on what the model itself writes."""

from pathlib import Path

import pytest

from autoround.engine import quantize
from autoround.errors import ModelError
from autoround.progress import Progress
from tests.data.words import make_tokenizer
from tests.engine.small import hashes, make, recipe


def test_a_run_that_was_stopped_goes_on_with_the_same_text(tmp_path: Path) -> None:
    tokenizer, source = make_tokenizer(), tmp_path / "source"
    make(vocab_size=len(tokenizer)).save_pretrained(source)
    tokenizer.save_pretrained(source)
    told: list[Progress] = []
    whole = quantize(source, recipe(tmp_path / "a", dataset="self"), on_progress=told.append)
    (one,) = whole.export()
    assert any(event.message.startswith("writing text: ") for event in told)
    next(iter(quantize(source, recipe(tmp_path / "b", dataset="self"))))
    again = quantize(source, recipe(tmp_path / "b", dataset="self"))
    assert [done.resumed for done in again] == [True] + [False] * (len(again.plan.parts) - 1)
    (two,) = again.export()
    assert hashes(one) == hashes(two)


def test_a_model_in_memory_needs_its_tokenizer_to_write(tmp_path: Path) -> None:
    run = quantize(make(vocab_size=1007), recipe(tmp_path, dataset="self"))
    with pytest.raises(ModelError, match="found no tokenizer with a model in memory"):
        run.export()
    run = quantize(make(vocab_size=1007), recipe(tmp_path, dataset="self"), tokenizer=make_tokenizer())
    assert run.export()[0].is_dir()
