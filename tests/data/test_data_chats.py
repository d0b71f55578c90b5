"""Chat data, chat templates and system prompts."""

from pathlib import Path

import pytest

from autoround.errors import DataError
from tests.data.words import BOS, EOS, TEMPLATE, decode_rows, load, make_tokenizer, write_records

CHAT = [
    {"role": "system", "content": "w9"},
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
]


@pytest.fixture
def chats(tmp_path: Path) -> str:
    """A file of six equal chats."""
    return write_records(tmp_path / "chats.jsonl", "messages", [CHAT] * 6)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """A file of one text."""
    return write_records(tmp_path / "texts.jsonl", "text", ["w1 w2"])


def test_chats_go_through_the_template_unasked(chats: str) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    rows = decode_rows(tokenizer, load(f"{chats}:concat=False", tokenizer, nsamples=1))
    assert rows == ["<|system|> w9 <|end|> <|user|> w1 w2 <|end|> <|assistant|> w3 <|end|>"]


def test_plain_texts_only_when_asked(texts: str) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    assert decode_rows(tokenizer, load(f"{texts}:concat=False", tokenizer, nsamples=1)) == ["w1 w2"]
    asked = load(f"{texts}:concat=False:apply_chat_template", tokenizer, nsamples=1)
    assert decode_rows(tokenizer, asked) == ["<|user|> w1 w2 <|end|> <|assistant|>"]


def test_system_prompt_belongs_to_its_item(chats: str, texts: str) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    items = (
        f'{chats}:num=1:concat=False:system_prompt="w7  w8"',
        f"{texts}:num=1:concat=False",
        f'{chats}:num=1:concat=False:system_prompt=""',
    )
    assert decode_rows(tokenizer, load(",".join(items), tokenizer, nsamples=3)) == [
        "<|system|> w7 w8 <|end|> <|user|> w1 w2 <|end|> <|assistant|> w3 <|end|>",
        "<|user|> w1 w2 <|end|> <|assistant|> w3 <|end|>",
        "w1 w2",
    ]


def test_chats_as_plain_text(chats: str) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    data = load(f"{chats}:concat=False:apply_chat_template=no", tokenizer, nsamples=1)
    assert decode_rows(tokenizer, data) == ["w9 w1 w2 w3"]


def test_a_tokenizer_without_template(chats: str, texts: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    load(chats, tokenizer, nsamples=1)
    assert len(caplog.messages) == 1
    assert "chats become plain text" in caplog.messages[0]
    caplog.clear()
    for option in ("apply_chat_template", "system_prompt=w1"):
        with pytest.raises(DataError, match="found a tokenizer without a chat template"):
            load(f"{texts}:{option}", tokenizer)


def test_templates_that_write_bos_do_not_double_it(chats: str) -> None:
    data = load(chats, make_tokenizer(bos=True, chat_template="<s> " + TEMPLATE), nsamples=3)
    assert (data.tokens_NT == BOS).sum(dim=1).tolist() == [1, 1, 1]


def test_templates_that_write_eos_do_not_double_it(chats: str) -> None:
    tokens = load(chats, make_tokenizer(chat_template=TEMPLATE + "</s>"), nsamples=4).tokens_NT.flatten()
    assert int((tokens == EOS).sum()) >= 5
    assert not bool(((tokens[1:] == EOS) & (tokens[:-1] == EOS)).any())


def test_templates_without_a_system_role(chats: str) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    tokenizer = make_tokenizer(chat_template=strict)
    rows = decode_rows(tokenizer, load(f"{chats}:concat=False", tokenizer, nsamples=1))
    assert rows == ["<|user|> w9 w1 w2 <|end|> <|assistant|> w3 <|end|>"]


def test_templates_are_always_told_the_same_day(chats: str) -> None:
    """A run that is stopped before midnight goes on after it."""
    day = "{% if strftime_now('%d %B %Y') == '01 January 2025' %}w7 {% endif %}"
    tokenizer = make_tokenizer(chat_template=day + TEMPLATE)
    rows = decode_rows(tokenizer, load(f"{chats}:concat=False", tokenizer, nsamples=1))
    assert rows[0].startswith("w7 <|")


def test_templates_that_refuse(chats: str) -> None:
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"document 1: the chat template refuses.*roles must alternate"):
        load(chats, tokenizer)
