"""The ``tokenizer.*`` keys of a GGUF file, from a tokenizer of transformers.

llama.cpp has two tokenizers that language models of today use:

- "gpt2", byte-level BPE: a name stands for the patterns that split a text; words are merged by rank.
- "llama", as in sentencepiece: spaces become U+2581; of two neighbours whose joined text is any token, those with the
  highest score are merged first; characters that are no tokens become bytes.

What a tokenizer does is read off its structure, never off its name. Where llama.cpp would split a text in another way
the tokenizer is refused. llama.cpp has no place for some things, which are not written: Unicode normalization (NFC),
that spaces around a special token are dropped, that no space goes in front of a text which starts with one or which
follows a special token. Its patterns of "tekken" and "gpt-4o" take accented letters for capitals as well as small, and
split combining marks off their letters; every file of these families shares that.
"""

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from autoround.errors import FormatError
from autoround.formats.gguf.container import Value
from autoround.log import LOGGER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Scores decide which neighbours merge first; those of added tokens and holes are by custom.
ADDED_SCORE, UNUSED_SCORE = -1000.0, -10000.0

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Control tokens that some tokenizers do not declare to be special.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused\d+>", re.DOTALL)

_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_THREE_DIGITS = rf"{_SUFFIX}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"

# Splits of a byte-level tokenizer in their order, and whether words that are tokens skip merging -> llama.cpp's name.
PRE: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((_THREE_DIGITS,), True): "llama-bpe",
    ((_THREE_DIGITS,), False): "dbrx",
    ((rf"{_SUFFIX}|{_LEAD}\p{{L}}+|\p{{N}}|{_REST}",), False): "qwen2",
    (
        (
            rf"{_SUFFIX}|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}"
            r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        False,
    ): "qwen35",
    (
        (
            rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        True,
    ): "tekken",
    (
        (
            rf"{_LEAD}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_LEAD}{_UPPER}+{_LOWER}*{_SUFFIX}?"
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        False,
    ): "gpt-4o",
}


class _Tokens(NamedTuple):
    texts: list[str]
    types: list[int]


def tokenizer_metadata(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> dict[str, Value]:
    """Return every ``tokenizer.*`` key of a GGUF file.

    Args:
        tokenizer: a fast tokenizer, as AutoTokenizer loads it: BPE, byte-level or with byte tokens.
        vocab_size: rows of the model's embedding; ids without a token become "[PADi]".

    Returns:
        Key -> value, as ``write_gguf`` takes them.

    Raises:
        FormatError: llama.cpp would tokenize in another way, or ids exceed ``vocab_size``.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(f"the class {type(tokenizer).__name__}", "a fast tokenizer, one with a tokenizer.json")
    core: dict[str, Any] = json.loads(backend.to_str())
    model = core["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        marked = "" if model["type"] != "BPE" else " with marked parts of words"
        raise _refusal(f"a model of type {model['type']}{marked}", "BPE, byte-level or with byte tokens")
    section = _sentencepiece(core, vocab_size) if model["byte_fallback"] else _byte_level(core, vocab_size)
    texts: Any = section["tokenizer.ggml.tokens"]
    if len(set(texts)) != vocab_size:
        raise _refusal("two tokens of the same text", "texts that differ, as llama.cpp looks tokens up by text")
    return section | _special(tokenizer) | _templates(tokenizer.chat_template)


def _byte_level(core: dict[str, Any], vocab_size: int) -> dict[str, Value]:
    """The keys of llama.cpp's "gpt2"."""
    model = core["model"]
    forms = [step["type"] for step in _flat(core["normalizer"], "normalizers")]
    if any(form != "NFC" for form in forms):
        raise _refusal(f"the normalizers {', '.join(forms)}", "none or NFC")
    tokens = _tokens(core, vocab_size)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre(core["pre_tokenizer"], bool(model.get("ignore_merges"))),
        "tokenizer.ggml.tokens": tokens.texts,
        "tokenizer.ggml.token_type": tokens.types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(model)],
    }


def _sentencepiece(core: dict[str, Any], vocab_size: int) -> dict[str, Value]:
    """The keys of llama.cpp's "llama"."""
    tokens = _tokens(core, vocab_size)
    if sum(type_ == BYTE for type_ in tokens.types) != 256:
        raise _refusal("a vocabulary without all of <0x00> to <0xFF>", "a token for every byte")
    prefix = _space_prefix(core)
    scores = _scores(core)
    defaults = {CONTROL: ADDED_SCORE, USER_DEFINED: ADDED_SCORE, UNKNOWN: 0.0, UNUSED: UNUSED_SCORE, BYTE: 0.0}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens.texts,
        "tokenizer.ggml.scores": [
            defaults.get(type_, scores.get(text, -float(len(scores)) - 1))
            for text, type_ in zip(tokens.texts, tokens.types, strict=True)
        ],
        "tokenizer.ggml.token_type": tokens.types,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _tokens(core: dict[str, Any], vocab_size: int) -> _Tokens:
    """Text and type of every id."""
    model = core["model"]
    bytes_too, unknown = model["byte_fallback"], model["unk_token"] or "<unk>"
    beyond = [added["content"] for added in core["added_tokens"] if added["special"] and added["id"] >= vocab_size]
    if beyond:  # which no row of the embedding stands for, as of Gemma 3 without images
        LOGGER.warning("tokenizer: left out %s, which the embedding has no row for", ", ".join(beyond))
    kept = [added for added in core["added_tokens"] if added["content"] not in beyond]
    ids = {**model["vocab"], **{added["content"]: added["id"] for added in kept}}
    ids = {text: index for text, index in ids.items() if text not in beyond}
    highest = max(ids.values())
    if highest >= vocab_size:
        raise _refusal(f"the token id {highest}", f"ids below {vocab_size}, the rows of the embedding")
    tokens = _Tokens([f"[PAD{index}]" for index in range(vocab_size)], [UNUSED] * vocab_size)
    for text, index in ids.items():
        tokens.texts[index] = text
        tokens.types[index] = BYTE if bytes_too and _BYTE_TOKEN.fullmatch(text) else NORMAL
    for added in kept:
        text, index = added["content"], added["id"]
        if bytes_too and text == unknown:
            tokens.types[index] = UNKNOWN
        elif added["special"] or _LOOKS_SPECIAL.fullmatch(text):
            tokens.types[index] = CONTROL
        elif tokens.types[index] != BYTE:
            # These are searched for before spaces are replaced.
            tokens.texts[index] = text.replace(_SPACE, " ") if bytes_too else text
            tokens.types[index] = USER_DEFINED
    return tokens


def _pre(pre_tokenizer: dict[str, Any] | None, ignore_merges: bool) -> str:
    """llama.cpp's name of the way in which a byte-level tokenizer splits a text."""
    splits: list[str] = []
    for step in _flat(pre_tokenizer, "pretokenizers"):
        splits += _splits(step)
    name = PRE.get((tuple(splits), ignore_merges))
    if name is None:
        merging = ", words that are tokens skip merging" if ignore_merges else ""
        raise _refusal(
            f"the splitting {' then '.join(splits) or 'none'}{merging}", f"that of {', '.join(sorted(PRE.values()))}"
        )
    return name


def _splits(step: dict[str, Any]) -> list[str]:
    """The patterns at which one step splits; what has no such form, as it is."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return [_GPT2] if step.get("use_regex", True) else []
        case {"type": "Digits", "individual_digits": True}:
            return [r"\p{N}"]
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False} | {
            "type": "Split",
            "pattern": {"Regex": str(pattern)},
            "behavior": "Removed",
            "invert": True,
        }:
            return [pattern]
    return [json.dumps(step, ensure_ascii=False)]


def _space_prefix(core: dict[str, Any]) -> bool:
    """Whether a text gets a space in front; refuses what is more than that and replacing spaces."""
    steps = [*_flat(core["normalizer"], "normalizers"), *_flat(core["pre_tokenizer"], "pretokenizers")]
    escaped = prefix = False
    for step in steps:
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                escaped = True
            case {"type": "Metaspace", "replacement": "\u2581", "split": False}:
                escaped, prefix = True, step["prepend_scheme"] != "never"
            case {"type": "Split", "pattern": {"String": " "}} if escaped:
                pass  # no spaces are left
            case _:
                raise _refusal(f"the step {json.dumps(step, ensure_ascii=False)}", "spaces replaced, nothing else")
    if not escaped:
        raise _refusal("byte tokens but spaces as they are", "spaces replaced by U+2581")
    return prefix


def _scores(core: dict[str, Any]) -> dict[str, float]:
    """Minus the rank of the first merge that makes a token.

    llama.cpp merges any two neighbours whose joined text is a token, so all of these pairs must be among the merges.
    Its neighbours are tokens, or characters even if they are none.
    """
    merges = _merges(core["model"])
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -float(rank))
    known, plain = set(merges), core["model"]["vocab"].keys() - {token["content"] for token in core["added_tokens"]}
    for text in plain:
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair not in known and all(len(part) == 1 or part in plain for part in pair):
                raise _refusal(
                    f"no merge of {pair[0]!r} and {pair[1]!r} although {text!r} is a token",
                    "merges of all pairs, which llama.cpp makes in a tokenizer with byte tokens",
                )
    return scores


def _special(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Value]:
    """Ids of special tokens, and which are put around a text."""
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "seperator": tokenizer.sep_token_id,  # so spelled in llama.cpp
        "padding": tokenizer.pad_token_id,
        "mask": tokenizer.mask_token_id,
    }
    section: dict[str, Value] = {f"tokenizer.ggml.{key}_token_id": id_ for key, id_ in ids.items() if id_ is not None}
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    start = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
    before, after = whole[:start], whole[start + len(plain) :]
    if before not in ([], [ids["bos"]]) or after not in ([], [ids["eos"]]):
        raise _refusal(f"the tokens {before} before and {after} after a text", "at most BOS before and EOS after it")
    return section | {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}


def _templates(chat_template: str | dict[str, str] | None) -> dict[str, Value]:
    """The chat template; of several, the others by name."""
    if chat_template is None:
        return {}
    if isinstance(chat_template, str):
        return {"tokenizer.chat_template": chat_template}
    others = {name: text for name, text in chat_template.items() if name != "default"}
    section: dict[str, Value] = {f"tokenizer.chat_template.{name}": text for name, text in others.items()}
    if "default" in chat_template:
        section["tokenizer.chat_template"] = chat_template["default"]
    return section | ({"tokenizer.chat_templates": sorted(others)} if others else {})


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs of a model in their order."""
    return [(left, right) for left, right in model["merges"]]


def _flat(step: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """The steps of a sequence, however deep; of a single one, itself."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for member in step[members] for inner in _flat(member, members)]


def _refusal(found: str, needed: str) -> FormatError:
    return FormatError(
        f"tokenizer: found {found}; needed {needed}, which is what GGUF can store; "
        "use another format such as auto_round"
    )
