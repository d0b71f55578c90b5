"""Makes the data of the tasks in this folder: ``python -m autoround.evaluate.tasks.make``."""

import json
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from autoround.data.python_docs import python_docs

FOLDER = Path(__file__).parent
CLOZES, CHOICES, DOCUMENTS = 100, 100, 30
_WRONG, _SHORTEST = 3, 30
_DOCUMENT_CHARACTERS = (600, 1600)
_BLANK_LINE = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_LAST_WORD = re.compile(r"^(?P<before>.*) (?P<word>[a-z]{4,})\.$")
_SENTENCE = re.compile(r"[A-Z][\w\s,;:'\"()`*./-]+[.]")
_SEED = 0


def make() -> dict[str, list[dict[str, object]]]:
    """The examples of every task by its short name, from the running Python's documentation; always the same ones."""
    documents = python_docs(("test",))
    seen = "\n".join(" ".join(text.split()) for text in python_docs(("train",)))
    passages = [own for text in documents for own in _prose(text) if not any(each in seen for each in own)]
    return {
        "cloze": _spread(list(_clozes(passages)), CLOZES),
        "choice": _spread(list(_choices(passages)), CHOICES),
        "perplexity": _spread(list(_whole(documents)), DOCUMENTS),
    }


def write(examples: Mapping[str, list[dict[str, object]]], folder: Path = FOLDER) -> None:
    """Write one JSON Lines file for each task."""
    for name, rows in examples.items():
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _prose(text: str) -> Iterator[list[str]]:
    """The sentences of each paragraph of two or more that holds nothing but prose."""
    for paragraph in _BLANK_LINE.split(text):
        sentences = _SENTENCE_END.split(" ".join(paragraph.split()))
        if len(sentences) > 1 and all(_SENTENCE.fullmatch(each) and len(each) >= _SHORTEST for each in sentences):
            yield sentences


def _clozes(passages: list[list[str]]) -> Iterator[dict[str, object]]:
    """Passages whose last word stands in them before."""
    for sentences in passages:
        for end in range(1, len(sentences)):
            last = _LAST_WORD.match(sentences[end])
            before = " ".join([*sentences[max(0, end - 3) : end], last["before"] if last else ""])
            if last and re.search(rf"\b{last['word']}\b", before):
                yield {"context": before, "word": last["word"]}


def _choices(passages: list[list[str]]) -> Iterator[dict[str, object]]:
    """A sentence, the second, and as many second ones of other passages as there are wrong answers."""
    rng = random.Random(_SEED)
    seconds = [sentences[1] for sentences in passages]
    for sentences in passages:
        wrong = rng.sample([each for each in seconds if each != sentences[1]], _WRONG)
        answer = rng.randrange(_WRONG + 1)
        choices = [*wrong[:answer], sentences[1], *wrong[answer:]]
        yield {"context": sentences[0], "choices": choices, "answer": answer}


def _whole(documents: list[str]) -> Iterator[dict[str, object]]:
    shortest, longest = _DOCUMENT_CHARACTERS
    for text in documents:
        if shortest <= len(text) <= longest:
            yield {"text": text}


def _spread(rows: list[dict[str, object]], count: int) -> list[dict[str, object]]:
    """So many of them, from beginning to end."""
    return [rows[index * len(rows) // count] for index in range(count)] if len(rows) > count else rows


if __name__ == "__main__":
    write(make())
