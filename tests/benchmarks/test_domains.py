"""Texts of the judge: what they are made of, how they are cut, and that they are the same every time."""

import ast
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from autoround.data.python_docs import python_docs
from autoround.errors import DataError
from benchmarks import domains


@pytest.fixture(scope="module")
def tokenizer(float_folder: Path) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(float_folder)
    return found


@pytest.mark.parametrize("domain", domains.DOMAINS)
def test_rows_are_documents_and_the_same_every_time(
    domain: str, float_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = domains.read(domain, float_folder, tokenizer, tokens=1000)
    assert rows == domains.read(domain, float_folder, tokenizer, tokens=1000)
    assert all(domains.SHORTEST <= len(row) <= domains.SEQLEN for row in rows)
    predicted = [len(row) - 1 for row in rows]
    assert sum(predicted[:-1]) < 1000 <= sum(predicted)
    if domain != domains.MODEL:
        assert domains.read(domain, float_folder, tokenizer, tokens=2000)[: len(rows)] == rows


def test_hardly_a_line_is_calibrated_on() -> None:
    """Documentation is kept apart by paragraphs, so that single lines recur."""
    seen = {line for text in python_docs() for line in text.splitlines() if len(line) > 60}
    for name, texts in domains.TEXTS.items():
        lines = [line for text in texts() for line in text.splitlines() if len(line) > 60]
        shared = sum(line in seen for line in lines)
        assert shared < len(lines) * (0.05 if name == "docs" else 0.01), name


def test_code_has_no_docstrings() -> None:
    texts = domains.code()
    assert len(texts) == len(set(texts)) > 500
    for text in texts[::10]:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                assert ast.get_docstring(node) is None


def test_prose_is_whole_english_paragraphs() -> None:
    texts = domains.prose()
    assert sum(map(len, texts)) > 60_000
    for text in texts:
        assert "://" not in text
        assert "[x]" not in text.lower()
        assert text.isascii() or sum(not c.isascii() for c in text) < len(text) * 0.05


def test_a_domain_with_too_little_text_is_refused(float_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="domain 'prose': found .* tokens to predict; needed 1000000"):
        domains.read("prose", float_folder, tokenizer, tokens=1_000_000)
