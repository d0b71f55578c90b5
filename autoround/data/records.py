"""One record of a file or hub dataset -> one document: a text, or a chat as a list of messages, perhaps with images.

Torch-free.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from autoround.data.language import did_you_mean
from autoround.data.pictures import Part, Shelf, picture
from autoround.errors import DataError

Message: TypeAlias = dict[str, str]
Chat: TypeAlias = list[Message]


class Pictured(NamedTuple):
    """A chat with images.

    Attributes:
        where: the row, for messages.
        messages: each with a role and its parts in order: texts and images.
    """

    where: str
    messages: tuple[tuple[str, tuple[Part, ...]], ...]

    @property
    def images(self) -> int:
        """How many it has."""
        return sum(not isinstance(part, str) for _, parts in self.messages for part in parts)


Document: TypeAlias = str | Chat | Pictured


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


def read_record(record: object, *, where: str, column: str | None = None, folder: Path = Path()) -> Document:
    """Return the document in a record; null and missing texts in a known column are empty documents.

    Images that a record has in a column of their own, ``images`` or ``image``, go where its messages show them: parts
    without a path, or ``<image>`` in a text. Where none does, they come before the first message that is the user's.

    Args:
        record: a string, or a mapping with a text, a chat or a question-and-answer pair.
        where: file or dataset with the row, for messages.
        column: the key to read, alone, but for images that its messages show; None looks for the known ones.
        folder: where paths of images begin.

    Raises:
        DataError: no document, a malformed chat, images in other numbers than places for them, or an image that is not
            there; the message names the row, its keys and the understood ones.
    """
    if isinstance(record, str):
        return record
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: found {_kind(record)}; understood: {_UNDERSTOOD}")
    shelf = Shelf(record, where=where, folder=folder)
    if column is not None:
        return _from_column(record, column, where=where, folder=folder, shelf=shelf)
    return _shown(_found(record, where=where, folder=folder, shelf=shelf), shelf, where)


def _found(record: Mapping[str, object], *, where: str, folder: Path, shelf: Shelf) -> Document:
    for key in CHAT_KEYS:
        if isinstance(messages := record.get(key), list):
            return _chat(messages, where=f"{where}, {key!r}", folder=folder, shelf=shelf)
    for key in TEXT_KEYS:
        if key in record and ((text := record[key]) is None or isinstance(text, str)):
            return text or ""
    for pair in PAIR_KEYS:
        question, answer = (record.get(key) for key in pair)
        if isinstance(question, str) and isinstance(answer, str):
            extra = (record.get("input") or record.get("context")) if pair[0] == "instruction" else None
            question = f"{question}\n\n{extra}" if isinstance(extra, str) and extra else question
            return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _only_text(record, where=where)


def _shown(document: Document, shelf: Shelf, where: str) -> Document:
    """A document with the images that no message of its own shows, before the first message of the user."""
    if not (rest := shelf.rest()):
        return document
    if isinstance(document, Pictured):
        messages = list(document.messages)
    else:
        chat = [{"role": "user", "content": document}] if isinstance(document, str) else document
        messages = [(each["role"], (each["content"],)) for each in chat]
    first = next((index for index, (role, _) in enumerate(messages) if role == "user"), None)
    if first is None:
        raise DataError(f"{where}: found images and no message of a user; needed one to show them in; leave them out")
    role, parts = messages[first]
    messages[first] = (role, (*rest, *(part for part in parts if part != "")))
    return Pictured(where, tuple(messages))


def plain_text(document: Document) -> str:
    """Return a document as text without a chat template and images: messages are joined by blank lines."""
    if isinstance(document, Pictured):
        texts = ("".join(part for part in parts if isinstance(part, str)) for _, parts in document.messages)
        return "\n\n".join(texts)
    return document if isinstance(document, str) else "\n\n".join(message["content"] for message in document)


def _from_column(record: Mapping[str, object], column: str, *, where: str, folder: Path, shelf: Shelf) -> Document:
    if column not in record:
        hint = did_you_mean(column, record)
        raise DataError(f"{where}: found keys {_keys(record)}; needed {column!r}, as column= asks{hint}")
    value = record[column]
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        found = _chat(value, where=f"{where}, {column!r}", folder=folder, shelf=shelf)
        shelf.rest()  # as many images as places
        return found
    raise DataError(f"{where}: found {_kind(value)} in {column!r}; needed a text or a list of messages")


def _only_text(record: Mapping[str, object], *, where: str) -> str:
    texts = [value for value in record.values() if isinstance(value, str)]
    if len(texts) == 1:
        return texts[0]
    if not texts and None in record.values():
        return ""
    raise DataError(f"{where}: found keys {_keys(record)}; understood: {_UNDERSTOOD}; name the key with column=KEY")


def _chat(messages: list[object], *, where: str, folder: Path, shelf: Shelf) -> Chat | Pictured:
    read = [
        _message(each, where=f"{where} message {index}", folder=folder, shelf=shelf)
        for index, each in enumerate(messages, 1)
    ]
    if any(not isinstance(part, str) for _, parts in read for part in parts):
        return Pictured(where, tuple(read))
    return [{"role": role, "content": "".join(map(str, parts))} for role, parts in read]


def _message(message: object, *, where: str, folder: Path, shelf: Shelf) -> tuple[str, tuple[Part, ...]]:
    """Role and parts of a message."""
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: found {_kind(message)}; needed a mapping with role and content")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str) or not (content is None or isinstance(content, str | list)):
        raise DataError(
            f"{where}: found keys {_keys(message)}; needed role (or from) and content (or value), both texts, or "
            "content as a list of parts"
        )
    if isinstance(content, list):
        return _ROLES.get(role, role), tuple(_part(part, where=where, folder=folder, shelf=shelf) for part in content)
    return _ROLES.get(role, role), shelf.filled(content or "")


def _part(part: object, *, where: str, folder: Path, shelf: Shelf) -> Part:
    """A text, or an image: its own, or the next one of the record's."""
    if isinstance(part, str):
        return part
    known = part if isinstance(part, Mapping) else {}
    if isinstance(text := known.get("text"), str) and known.get("type") != "image":
        return text
    own = picture(known, where=where, folder=folder)
    if own is None and known.get("type") == "image":
        own = shelf.take()
    if own is None:
        raise DataError(
            f"{where}: found content that is neither text nor an image; needed parts such as "
            f'{{"type": "text", "text": …}} and {{"type": "image", "path": …}}; remove other media'
        )
    return own


def _keys(record: Mapping[str, object]) -> str:
    return ", ".join(repr(key) for key in record) or "none"


def _kind(value: object) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"
