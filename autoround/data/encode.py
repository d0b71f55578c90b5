"""Documents -> token ids: chats through the tokenizer's template, special tokens kept apart for the packer.

Torch-free: a tokenizer is passed in.
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from autoround.data.language import DatasetSpec
from autoround.data.records import Chat, Document, Pictured, plain_text
from autoround.errors import DataError
from autoround.log import LOGGER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 64
# What templates that tell the model which day it is are given.
DAY = "01 January 2025"


class Specials(NamedTuple):
    """Special tokens of a tokenizer.

    Args:
        prefix: what the tokenizer puts before every text, BOS as a rule; empty if it adds nothing.
        separator: what ends a document in a packed row: EOS, or a blank line where there is no EOS.
        eos: the id of EOS, if there is one.
        pad: the id that fills short rows: EOS, else 0.
    """

    prefix: tuple[int, ...]
    separator: tuple[int, ...]
    eos: int | None
    pad: int


def find_specials(tokenizer: "PreTrainedTokenizerBase") -> Specials:
    """Return the special tokens in use, found by encoding a probe with and without them."""
    plain = _ids(tokenizer, "a")
    wrapped: list[int] = tokenizer("a", verbose=False)["input_ids"]
    starts = (start for start in range(len(wrapped)) if plain and wrapped[start : start + len(plain)] == plain)
    prefix = tuple(wrapped[: next(starts, 0)])
    eos: int | None = tokenizer.eos_token_id
    if eos is None:
        return Specials(prefix, tuple(_ids(tokenizer, "\n\n")), None, 0)
    return Specials(prefix, (eos,), eos, eos)


def encode(
    documents: Iterator[Document],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    spec: DatasetSpec,
    specials: Specials,
) -> Iterator[list[int]]:
    """Yield the token ids of every document, without the tokenizer's prefix; no ids for an empty document.

    Chats are joined as plain text, with one warning, if the tokenizer has no template and none was asked for.

    Args:
        documents: texts and chats; read in small chunks, as far as the result is.
        tokenizer: turns text into ids; its chat template renders chats.
        spec: apply_chat_template and system_prompt; see ``DatasetSpec``.
        specials: of the same tokenizer.

    Raises:
        DataError: a template is asked for and the tokenizer has none, or it refuses a conversation.
    """
    renderer = _Renderer(tokenizer, spec)
    numbered = enumerate(documents, 1)
    while chunk := list(itertools.islice(numbered, _CHUNK)):
        texts = [renderer.render(document, number) for number, document in chunk]
        full = [text for text in texts if text]
        encoded = iter(_batch(tokenizer, full) if full else [])
        yield from (_without_prefix(next(encoded), specials) if text else [] for text in texts)


class _Renderer:
    """Turns documents into text, through the chat template where it applies."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", spec: DatasetSpec) -> None:
        self._tokenizer, self._spec = tokenizer, spec
        self._asked = bool(spec.apply_chat_template) or spec.system_prompt is not None
        self._warned = False
        if self._asked and tokenizer.chat_template is None:
            raise DataError(
                f"dataset {spec.name!r}: found a tokenizer without a chat template; apply_chat_template and "
                "system_prompt need one; drop them, or use a chat model"
            )

    def render(self, document: Document, number: int) -> str:
        """The text of a document; empty if it holds nothing but white space."""
        if isinstance(document, Pictured):
            raise DataError(
                f"{document.where}: found an image after rows without any; needed text alone; give rows with images "
                "as a dataset of their own"
            )
        plain = plain_text(document)
        if not plain.strip():
            return ""
        if (isinstance(document, str) and not self._asked) or self._spec.apply_chat_template is False:
            return plain
        if self._tokenizer.chat_template is None:
            if not self._warned:
                LOGGER.warning(
                    "dataset %r: the tokenizer has no chat template; chats become plain text", self._spec.name
                )
            self._warned = True
            return plain
        return self._apply(conversation(document, self._spec.system_prompt), number)

    def _apply(self, chat: Chat, number: int) -> str:
        from jinja2.exceptions import TemplateError

        try:
            try:
                return _template(self._tokenizer, chat)
            except TemplateError:
                if chat[0]["role"] != "system" or len(chat) == 1:
                    raise
                return _template(self._tokenizer, _system_in_user(chat))
        except TemplateError as error:
            raise DataError(
                f"dataset {self._spec.name!r}, document {number}: the chat template refuses this conversation "
                f"({error}); correct it, or read it as plain text with apply_chat_template=False"
            ) from error


def conversation(document: str | Chat, system_prompt: str | None) -> Chat:
    """A document as a chat, with this system prompt in place of its own; the empty one takes that away."""
    chat: Chat = [{"role": "user", "content": document}] if isinstance(document, str) else document
    if system_prompt is None:
        return chat
    rest = [message for message in chat if message["role"] != "system"]
    return [{"role": "system", "content": system_prompt}, *rest] if system_prompt else rest


def undated(template: str | dict[str, str] | None) -> str | None:
    """A chat template in which it is always the same day, so that rows are the same tomorrow; None where none is told.

    >>> undated("{{ strftime_now('%Y') }}"), undated("{{ messages }}")
    ("{%- macro strftime_now(format) -%}01 January 2025{%- endmacro -%}{{ strftime_now('%Y') }}", None)
    """
    text = template.get("default") if isinstance(template, dict) else template
    macro = f"{{%- macro strftime_now(format) -%}}{DAY}{{%- endmacro -%}}"
    return macro + text if text and "strftime_now" in text else None


def _system_in_user(chat: Chat) -> Chat:
    """For templates without a system role: its text leads the message after it."""
    system, first, *rest = chat
    return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def _template(tokenizer: "PreTrainedTokenizerBase", chat: Chat) -> str:
    opens_answer = not chat or chat[-1]["role"] != "assistant"
    text = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=opens_answer, chat_template=undated(tokenizer.chat_template)
    )
    assert isinstance(text, str)
    return text


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return _batch(tokenizer, [text])[0]


def _batch(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _without_prefix(ids: list[int], specials: Specials) -> list[int]:
    """Templates may write BOS themselves; the packer adds it, so it goes here."""
    size = len(specials.prefix)
    return ids[size:] if size and tuple(ids[:size]) == specials.prefix else ids
