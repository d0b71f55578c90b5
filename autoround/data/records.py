"""One record of a file or hub dataset -> one document: a text, or a chat as a list of messages. Torch-free."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from autoround.data.language import did_you_mean
from autoround.errors import DataError

Message: TypeAlias = dict[str, str]
Chat: TypeAlias = list[Message]
Document: TypeAlias = str | Chat


class Source(NamedTuple):
    """Documents, and in words where they come from."""

    origin: str
    documents: Iterator[Document]


TEXT_KEYS = ("text", "content", "document", "markdown", "body", "code", "sentence")
CHAT_KEYS = ("messages", "conversations", "conversation")
PAIR_KEYS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("query", "response"),
)
_ROLES: Mapping[str, str] = MappingProxyType(
    {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
)
_UNDERSTOOD = (
    f"a string, a text in {', '.join(TEXT_KEYS)}, a chat in {' or '.join(CHAT_KEYS)}, "
    f"a pair such as {' + '.join(PAIR_KEYS[0])}, or a single text column"
)


def read_record(record: object, *, where: str, column: str | None = None) -> Document:
    """Return the document in a record; null and missing texts in a known column are empty documents.

    Args:
        record: a string, or a mapping with a text, a chat or a question-and-answer pair.
        where: file or dataset with the row, for messages.
        column: the key to read; None looks for the known ones.

    Raises:
        DataError: no document, or a malformed chat; the message names the row, its keys and the understood ones.
    """
    if isinstance(record, str):
        return record
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: found {_kind(record)}; understood: {_UNDERSTOOD}")
    if column is not None:
        return _from_column(record, column, where=where)
    for key in CHAT_KEYS:
        if isinstance(record.get(key), list):
            return _chat(record[key], where=f"{where}, {key!r}")
    for key in TEXT_KEYS:
        if key in record and (record[key] is None or isinstance(record[key], str)):
            return record[key] or ""
    for pair in PAIR_KEYS:
        question, answer = (record.get(key) for key in pair)
        if isinstance(question, str) and isinstance(answer, str):
            extra = record.get("input") if pair[0] == "instruction" else None
            question = f"{question}\n\n{extra}" if isinstance(extra, str) and extra else question
            return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _only_text(record, where=where)


def plain_text(document: Document) -> str:
    """Return a document as text without a chat template: messages are joined by blank lines."""
    return document if isinstance(document, str) else "\n\n".join(message["content"] for message in document)


def _from_column(record: Mapping[str, object], column: str, *, where: str) -> Document:
    if column not in record:
        hint = did_you_mean(column, record)
        raise DataError(f"{where}: found keys {_keys(record)}; needed {column!r}, as column= asks{hint}")
    value = record[column]
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        return _chat(value, where=f"{where}, {column!r}")
    raise DataError(f"{where}: found {_kind(value)} in {column!r}; needed a text or a list of messages")


def _only_text(record: Mapping[str, object], *, where: str) -> str:
    texts = [value for value in record.values() if isinstance(value, str)]
    if len(texts) == 1:
        return texts[0]
    if not texts and None in record.values():
        return ""
    raise DataError(f"{where}: found keys {_keys(record)}; understood: {_UNDERSTOOD}; name the key with column=KEY")


def _chat(messages: list[object], *, where: str) -> Chat:
    return [_message(message, where=f"{where} message {index}") for index, message in enumerate(messages, 1)]


def _message(message: object, *, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: found {_kind(message)}; needed a mapping with role and content")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = "".join(_piece(piece, where=where) for piece in content)
    if not isinstance(role, str) or not (content is None or isinstance(content, str)):
        raise DataError(
            f"{where}: found keys {_keys(message)}; needed role (or from) and content (or value), both texts"
        )
    return {"role": _ROLES.get(role, role), "content": content or ""}


def _piece(piece: object, *, where: str) -> str:
    text = piece.get("text") if isinstance(piece, Mapping) else piece
    if not isinstance(text, str):
        raise DataError(f"{where}: found content that is not text; needed text only; remove images and other media")
    return text


def _keys(record: Mapping[str, object]) -> str:
    return ", ".join(repr(key) for key in record) or "none"


def _kind(value: object) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"
