"""Small tokenizers of the kinds that GGUF can store, trained on a few lines, and texts to try them on."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CohereTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

LINES = [
    "The quick brown fox doesn't jump over 12 lazy dogs, they've seen 345678 of them; I'll say it's true.",
    "def add(first, second):\n    return first + second\n\n\nprint(add(1, 2))  # 3\r\n",
    "Über die Brücke ging ein Mädchen; naïve café, Ångström, École, ПРИВЕТ мир, ελληνικά, 東京都は日本の首都です。",
    '    four spaces,  two spaces\t\ttabs\n\n\n\nand newlines ... !!! ??? --- === /// <html> {"key": [1.5e-3, null]}',
]
SPECIAL, MARK = "<|end|>", "<mark>"
TEXTS = [
    *LINES[:3],
    "a",
    "Hello world",
    "two  three   four    spaces and a last one ",
    "one\ntwo\n\nthree\n\n\n\n  indented\r\nreturned\t\ttabbed \n  \n",
    "0 1 12 123 1234 12345 3.14159 1e-9 0x1F ½ ² ٣٤",
    "It's they'VE I'LL don'T 'quoted' ''twice''",
    "CamelCaseWords snake_case_words SCREAMING_CASE iPhone McDonald",
    "déjà vu, żółć, Straße, ДА нет, עברית, 한국어, 漢字かな交じり文",
    "emoji 🙂👩‍👩‍👧 flags 🇩🇪 and rare 𐍈 \u00a0\u3000\u200b wide",
    f"one{SPECIAL}two {SPECIAL}three{SPECIAL}{SPECIAL}",
    f"a{MARK}b {MARK}c",
]
# Where a space goes in front of texts, Metaspace puts none in front of these while sentencepiece and llama.cpp do.
LEADING = [LINES[3], " one", "  two", f"one{SPECIAL} two{MARK} three"]
# llama.cpp's "tekken" and "gpt-4o" split combining marks off their letters.
COMBINING = ["हिन्दी और ไทย, नमस्ते"]

_THREE_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_Split = pre_tokenizers.PreTokenizer


def split(pattern: str) -> _Split:
    """Split at a pattern, then bytes."""
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(steps)


# llama.cpp's name -> how a text is split, and whether words that are tokens skip merging.
SPLITS: dict[str, tuple[_Split, bool]] = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), False),
    "llama-bpe": (split(_THREE_DIGITS), True),
    "dbrx": (split(_THREE_DIGITS), False),
    "tekken": (split(_TEKKEN), True),
    "gpt-4o": (split(_GPT4O), False),
    "qwen35": (split(_QWEN35), False),
}
# The classes of transformers that are byte-level whatever they are given -> llama.cpp's name.
CLASSES = {GPT2Tokenizer: "gpt-2", CohereTokenizer: "smollm", Qwen2Tokenizer: "qwen2"}


def byte_level_parts() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of whole texts, so that tokens show where a text is split before."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, special_tokens=["<s>", SPECIAL], show_progress=False
    )
    core.train_from_iterator([text for text in TEXTS + COMBINING if "wide" not in text], trainer)
    merges = json.loads(core.to_str())["model"]["merges"]
    return core.get_vocab(), [(left, right) for left, right in merges]


def byte_level(pre_tokenizer: _Split, *, ignore_merges: bool = False, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, with a word among its tokens that no merges lead to."""
    vocab, merges = byte_level_parts()
    vocab["\u0120wide"] = len(vocab)
    core = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    core.pre_tokenizer, core.decoder = pre_tokenizer, decoders.ByteLevel()
    core.add_special_tokens(["<s>", SPECIAL])
    core.add_tokens([AddedToken(MARK, normalized=False)])
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>" if bos else None, eos_token=SPECIAL)


def of_class(kind: type[PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """A tokenizer of a class of transformers."""
    vocab, merges = byte_level_parts()
    special = {name: SPECIAL for name in ("unk_token", "bos_token", "eos_token", "pad_token")}
    special |= {name: None for name in ("cls_token", "sep_token", "mask_token")}
    tokenizer = kind(vocab=vocab, merges=merges, **special)
    tokenizer.add_tokens([AddedToken(MARK, normalized=False)])
    return tokenizer


def sentencepiece_parts() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges as in Llama-2: special tokens, bytes, pieces by rank, characters; all pairs that fit."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.train_from_iterator(LINES * 3, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    found = [
        text for text, _ in sorted(core.get_vocab().items(), key=lambda item: item[1]) if set(text).isdisjoint("\r\n\t")
    ]
    pieces = [text for text in found if len(text) > 1] + ["\u2581" * count for count in (2, 4, 3, 8)]
    characters = [text for text in found if len(text) == 1]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *characters]
    vocab = {text: index for index, text in enumerate(texts)}
    cuts = [(text[:cut], text[cut:]) for text in pieces for cut in range(1, len(text))]
    return vocab, [pair for pair in cuts if pair[0] in vocab and pair[1] in vocab]


def sentencepiece(kind: type[PreTrainedTokenizerBase] = LlamaTokenizer) -> PreTrainedTokenizerBase:
    """A tokenizer of a class of transformers with byte tokens."""
    vocab, merges = sentencepiece_parts()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    if kind is GemmaTokenizer:
        special |= {"pad_token": "</s>", "mask_token": "<unk>"}
    else:
        special |= {"legacy": True, "add_bos_token": True}
    tokenizer = kind(vocab=vocab, merges=merges, **special)
    tokenizer.add_tokens([AddedToken(SPECIAL, special=True, normalized=False), AddedToken(MARK, normalized=False)])
    return tokenizer


def normalized() -> PreTrainedTokenizerFast:
    """A tokenizer with byte tokens whose normalizer puts a space in front of every text, as in older files."""
    vocab, merges = sentencepiece_parts()
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.add_tokens([AddedToken(MARK, normalized=False)])
    core.add_special_tokens(["<unk>", "<s>", "</s>", SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
