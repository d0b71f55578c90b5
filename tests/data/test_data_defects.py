"""Defects that calibration data has elsewhere (auto-round 0.16) and must not have here, one test each.

That ``split=`` counts for every dataset, and that a failed download ends nothing but the run, is in test_data_hub.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoround.errors import DataError, UsageError
from tests.data.words import BOS, TEMPLATE, decode_rows, load, make_tokenizer, words, write_records

ROOT = Path(__file__).parents[2]
CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
ORDER = """
import hashlib, random, sys
from autoround.data.language import parse_specs
from autoround.data.sources import documents
found = hashlib.sha256()
for spec in parse_specs(sys.argv[1]):
    for text in documents(spec, rng=random.Random("7:0"), rows=4):
        found.update(str(text).encode())
print(found.hexdigest())
"""


def test_the_template_switch_holds_for_sets_of_chats(tmp_path: Path) -> None:
    """Elsewhere it is always reset to off, so that chats are joined as plain text."""
    name = write_records(tmp_path / "ultrachat.jsonl", "messages", [CHAT])
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    for option in ("", ":apply_chat_template", ":apply_chat_template=True"):
        rows = decode_rows(tokenizer, load(f"{name}:concat=False{option}", tokenizer, nsamples=1))
        assert rows == ["<|user|> w1 w2 <|end|> <|assistant|> w3 <|end|>"]


def test_packing_with_bos_keeps_every_row_full() -> None:
    """400 texts of 500 tokens at seqlen 512: elsewhere 251 of 401 rows are short and dropped."""
    texts = [words(500, index) for index in range(400)]
    data = load(texts, make_tokenizer(bos=True), nsamples=392, seqlen=512)
    assert data.tokens_NT.shape == (392, 512)
    assert bool(data.valid_NT.all())
    assert torch.equal((data.tokens_NT == BOS).sum(dim=1), torch.ones(392, dtype=torch.int64))
    assert bool((data.tokens_NT[:, 0] == BOS).all())


def test_one_set_twice_with_numbers_of_their_own(tmp_path: Path) -> None:
    """Elsewhere numbers are kept by name, so that the second replaces the first."""
    name = write_records(tmp_path / "a.jsonl", "text", [words(20, 20 * index) for index in range(40)])
    report = load(f"{name}:num=3,{name}:num=5", make_tokenizer(), nsamples=8).report
    assert [source.rows for source in report.sources] == [3, 5]


def test_shares_are_as_written_whatever_the_sizes(tmp_path: Path) -> None:
    """Elsewhere sources are sorted by size, and a sum of numbers beyond the samples counts as none."""
    small = write_records(tmp_path / "small.jsonl", "text", [words(64)])
    large = write_records(tmp_path / "large.jsonl", "text", [words(999)] * 9)
    report = load(f"{large}:num=2,{small}:num=3,{large}", make_tokenizer(), nsamples=9).report
    assert [source.rows for source in report.sources] == [2, 3, 4]


def test_short_texts_are_not_lost_without_concat() -> None:
    """Elsewhere a text shorter than a row is dropped unless concat is asked for."""
    data = load([words(5, 5 * index) for index in range(80)], make_tokenizer(), nsamples=30)
    assert (data.report.rows, data.report.sources[0].kept) == (30, 80)


def test_a_system_prompt_does_not_leak_to_the_next_item(tmp_path: Path) -> None:
    name = write_records(tmp_path / "a.jsonl", "messages", [CHAT])
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    items = f"{name}:num=1:concat=no:system_prompt=w9,{name}:num=1:concat=no"
    rows = decode_rows(tokenizer, load(items, tokenizer, nsamples=2))
    assert [row.startswith("<|system|> w9") for row in rows] == [True, False]


@pytest.mark.parametrize("text", ["pile-10k:train", "a.jsonl:nmu=3", "a.jsonl:seqlen=3", "self:rows=2"])
def test_unknown_options_are_errors(text: str) -> None:
    with pytest.raises(UsageError, match="found unknown option"):
        load(text, make_tokenizer())


def test_text_files_are_read_and_others_named(tmp_path: Path) -> None:
    """Elsewhere a .txt file logs an error and ends in a TypeError."""
    (tmp_path / "a.txt").write_text(words(64))
    assert load(str(tmp_path / "a.txt"), make_tokenizer()).report.rows == 4
    (tmp_path / "a.pdf").write_text(words(64))
    with pytest.raises(DataError, match=r"found suffix '\.pdf'; needed one of \.jsonl"):
        load(str(tmp_path / "a.pdf"), make_tokenizer())


def test_paths_and_prompts_may_hold_what_the_language_uses(tmp_path: Path) -> None:
    name = write_records(tmp_path / "a, b:c=d.jsonl", "messages", [CHAT])
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    prompt = 'system_prompt="w1,w2: w3=w4 ""w5"""'
    assert load(f"{name}:concat=no:{prompt}", tokenizer, nsamples=1).report.rows == 1


def test_the_order_is_the_same_in_every_process(tmp_path: Path) -> None:
    for index in range(5):
        write_records(tmp_path / f"{index}.jsonl", "text", [words(3, 10 * index + row) for row in range(9)])
    found = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-c", ORDER, f'"{tmp_path}",python-docs']
        done = subprocess.run(
            command, env={"PYTHONHASHSEED": seed}, cwd=ROOT, capture_output=True, text=True, check=True
        )
        found.add(done.stdout)
    assert len(found) == 1
