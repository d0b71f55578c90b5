"""Rows that tiny models write, against the same choices made from forwards without a cache."""

import random
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

from autoround.errors import DataError, ModelError
from autoround.model.load import open_model
from autoround.model.sample import GREEDY, REPORTS, Sampler
from tests.model.tiny import CONFIGS, VOCABULARY, make, save

FIRSTS, END = tuple(range(3, VOCABULARY)), 2
ASKED: dict[str, Any] = {"prefix": (), "firsts": FIRSTS, "ends": (), "seed": "7"}


def expected_row(
    model: PreTrainedModel, number: int, tokens: int, *, prefix: tuple[int, ...], firsts: tuple[int, ...]
) -> list[int]:
    """One row by the rule, every token from a forward of its own."""
    generator, row, age = random.Random(f"7:{number}"), list(prefix), 0
    while len(row) < tokens:
        drawn = generator.random()
        if age == 0 and firsts:
            token = firsts[int(drawn * len(firsts))]
        else:
            with torch.no_grad():
                logits_V = model(torch.tensor([row]), use_cache=False).logits[0, -1].float()
            cumulated_V = logits_V.softmax(-1).double().cumsum(-1)
            token = int((cumulated_V <= drawn * cumulated_V[-1]).sum())
            if 0 < age <= GREEDY and int(logits_V.argmax()) != END:
                token = int(logits_V.argmax())
        age = 0 if token == END else age + 1
        row.append(token)
    return row


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bloom"])
def test_rows_follow_the_rule(name: str) -> None:
    model = make(name)
    sampler = Sampler(open_model(model))
    for prefix, firsts in (((), FIRSTS), ((1,), ()), ((1,), FIRSTS)):
        rows = sampler.sample(3, 24, prefix=prefix, firsts=firsts, ends=(), seed="7")
        assert rows == [expected_row(model, number, 24, prefix=prefix, firsts=firsts) for number in range(3)]


def test_documents_end_and_others_begin() -> None:
    model = make("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.05)  # nearly even: the end comes soon
    rows = Sampler(open_model(model)).sample(4, 100, prefix=(), firsts=(40, 41), ends=(3,), seed="7")
    after = [row[place + 1] for row in rows for place in range(99) if row[place] in (END, 3)]
    assert len(after) > 4
    assert set(after) <= {40, 41}


@pytest.mark.parametrize("name", CONFIGS)
def test_seeds_and_counts(name: str) -> None:
    sampler = Sampler(open_model(make(name)))
    rows = sampler.sample(4, 16, **ASKED)
    assert [len(row) for row in rows] == [16] * 4
    assert sampler.sample(4, 16, **ASKED) == rows
    assert sampler.sample(2, 16, **ASKED) == rows[:2]
    assert sampler.sample(4, 16, **ASKED | {"seed": "8"}) != rows
    assert len({tuple(row) for row in rows}) == 4


def test_more_rows_than_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(open_model(make("llama")))
    rows = sampler.sample(5, 16, **ASKED)
    monkeypatch.setattr("autoround.model.sample.MOST_ROWS", 2)
    told: list[tuple[int, int]] = []
    parts = Sampler(open_model(make("llama")), on_progress=lambda done, total: told.append((done, total)))
    assert parts.sample(5, 16, **ASKED) == rows
    assert told == sorted(set(told))
    assert told[-1] == (80, 80)
    assert len(told) <= REPORTS


def test_a_folder_in_another_dtype_and_the_model_as_it_was(tmp_path: Path) -> None:
    model = save("llama_tied", tmp_path)
    opened = open_model(tmp_path)
    sampler = Sampler(opened, dtype=torch.bfloat16)
    assert sampler.vocab_size == VOCABULARY
    assert {len(row) for row in sampler.sample(2, 9, **ASKED)} == {9}
    assert all(parameter.is_meta for parameter in opened.skeleton.parameters())
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = Sampler(open_model(model)).sample(2, 9, **ASKED)
    assert rows == Sampler(opened).sample(2, 9, **ASKED)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_rows_as_short_as_what_they_begin_with() -> None:
    sampler = Sampler(open_model(make("llama")))
    assert sampler.sample(2, 1, **ASKED | {"prefix": (1,)}) == [[1], [1]]
    assert sampler.sample(2, 2, **ASKED | {"prefix": (1,), "firsts": (9,)}) == [[1, 9], [1, 9]]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save("llama", tmp_path)
    for wrong in ({"firsts": (VOCABULARY,)}, {"prefix": (-1,)}):
        with pytest.raises(DataError, match="ids beyond the model's 48"):
            Sampler(open_model(model)).sample(1, 4, **ASKED | wrong)
    with pytest.raises(DataError, match="neither a prefix nor first tokens"):
        Sampler(open_model(model)).sample(1, 4, **ASKED | {"firsts": ()})
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        Sampler(open_model(model)).sample(1, 4, **ASKED)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1000))
    with pytest.raises(DataError, match=r"found 0.0 GB of free memory; needed 0.0 GB.*python-docs or a file"):
        Sampler(open_model(tmp_path)).sample(1, 4, **ASKED)
