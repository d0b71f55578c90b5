"""The tasks that come with the package."""

import json
import sys
from pathlib import Path

import pytest

from autoround.data.python_docs import python_docs
from autoround.evaluate.harness import load_tasks
from autoround.evaluate.tasks.make import FOLDER, make, write

MADE_WITH = (3, 11, 7)
NAMES = ("cloze", "choice", "perplexity")


def test_they_are_found_without_a_path_and_are_what_they_say() -> None:
    loaded = load_tasks([f"python_docs_{name}" for name in NAMES], None).loaded
    kinds = {name: own[0].config.output_type for name, own in loaded.items()}
    assert list(kinds.values()) == ["loglikelihood", "multiple_choice", "loglikelihood_rolling"]
    counts = {name: len(own[0].test_docs()) for name, own in loaded.items()}
    assert counts == {"python_docs_cloze": 59, "python_docs_choice": 100, "python_docs_perplexity": 30}


def test_answers_are_right_ones() -> None:
    rows = {name: [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()] for name in NAMES}
    assert all(row["word"] in row["context"] for row in rows["cloze"])
    assert all(len(set(row["choices"])) == 4 for row in rows["choice"])
    assert len({row["answer"] for row in rows["choice"]}) == 4


@pytest.mark.skipif(sys.version_info[:3] != MADE_WITH, reason="the data are of another version's documentation")
def test_the_data_are_what_the_script_makes(tmp_path: Path) -> None:
    write(make(), tmp_path)
    train = "\n".join(" ".join(text.split()) for text in python_docs())
    for name in NAMES:
        assert (tmp_path / f"{name}.jsonl").read_text() == (FOLDER / f"{name}.jsonl").read_text()
    contexts = [json.loads(line)["context"] for line in (FOLDER / "choice.jsonl").read_text().splitlines()]
    assert not [each for each in contexts if each in train]
