"""A word tokenizer, every word one token, and ways to load data with it, so that tests can count."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from autoround.data.tokens import Calibration, Dataset, load_calibration
from autoround.data.written import Writer

BOS, EOS = 1, 2
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(*, bos: bool = False, eos: bool = True, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words w0 … w999, with or without BOS, EOS and a chat template."""
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    vocab = {word: index for index, word in enumerate([*special, *(f"w{index}" for index in range(1000))])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>" if bos else None, eos_token="</s>" if eos else None
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def words(count: int, first: int = 0) -> str:
    """Return a text of that many tokens."""
    return " ".join(f"w{(first + index) % 1000}" for index in range(count))


def random_texts(rows: int, count: int) -> list[str]:
    """Return texts of that many tokens each, always the same ones."""
    draw = random.Random(0)
    return [" ".join(f"w{draw.randrange(1000)}" for _ in range(count)) for _ in range(rows)]


def write_random_texts(file: Path, rows: int, count: int) -> Path:
    """Write such texts as JSON lines; returns the file."""
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in random_texts(rows, count)))
    return file


class StubWriter:
    """A model that writes its first ids, the row's number and the seed; keeps what it was asked."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.asked: list[tuple[Sequence[int], Sequence[int], Sequence[int], str]] = []

    def sample(
        self, rows: int, tokens: int, *, prefix: Sequence[int], firsts: Sequence[int], ends: Sequence[int], seed: str
    ) -> list[list[int]]:
        self.asked.append((prefix, firsts, ends, seed))
        return [[*prefix, row, *range(7, 7 + tokens - 1 - len(prefix))] for row in range(rows)]


def load(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    *,
    nsamples: int = 4,
    seqlen: int = 16,
    batch_size: int = 1,
    writer: Writer | None = None,
) -> Calibration:
    """Load with small defaults."""
    return load_calibration(
        dataset, tokenizer, nsamples=nsamples, seqlen=seqlen, batch_size=batch_size, seed=7, writer=writer
    )


def write_records(path: Path, key: str, values: Sequence[object]) -> str:
    """Write a .jsonl file and return its name as the mini-language wants it."""
    path.write_text("".join(json.dumps({key: value}) + "\n" for value in values))
    return f'"{path}"'


def decode_rows(tokenizer: PreTrainedTokenizerFast, data: Calibration) -> list[str]:
    """Return the texts of the rows without padding, sorted."""
    return sorted(str(tokenizer.decode(row[valid])) for row, valid in zip(*data[:2], strict=True))
