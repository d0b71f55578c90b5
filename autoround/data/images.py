"""Chats with images -> token rows and what a model needs beside them, through the model's own processor.

Legend: N rows, T tokens in a row.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from autoround.data.encode import conversation
from autoround.data.language import DatasetSpec
from autoround.data.packing import Row, RowRequest
from autoround.data.records import Document, Pictured
from autoround.data.report import SourceReport
from autoround.errors import DataError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

Extras: TypeAlias = Mapping[str, Tensor]
_OF_TEXT = ("input_ids", "attention_mask")


class Made(NamedTuple):
    """A row: its token ids, and the model's other arguments for it by name."""

    ids: Row
    extras: Extras = {}  # noqa: RUF012


def rows_with_images(
    documents: Iterable[Document], request: RowRequest, processor: "ProcessorMixin", *, spec: DatasetSpec
) -> tuple[list[Made], SourceReport]:
    """Make every document one row. Longer ones than ``seqlen`` are cut where they have no image, else dropped.

    Args:
        documents: texts and chats, with images or without; read until there are enough rows.
        request: rows wanted and tokens in each.
        processor: of the model; its chat template renders all of them.
        spec: where they come from.

    Raises:
        DataError: an image that cannot be read, a conversation that the processor refuses, or a processor without
            a chat template.
    """
    if spec.apply_chat_template is False or processor.chat_template is None:
        found = "apply_chat_template=False" if processor.chat_template else "a processor without a chat template"
        raise DataError(f"dataset {spec.name!r}: found {found}; images need a template; leave them out")
    rows: list[Made] = []
    read = cut = 0
    for document in documents:
        read += 1
        own = _processed(_messages(document, spec), processor, f"dataset {spec.name!r}, document {read}")
        beyond = max(0, len(own.ids) - request.seqlen)
        cut += beyond
        if not beyond or not isinstance(document, Pictured):
            rows.append(own)
        if len(rows) == request.rows:
            break
    dropped = (("longer than seqlen, with images", read - len(rows)),) if read > len(rows) else ()
    kept = [shortened(row, request.seqlen) for row in rows]
    return kept, SourceReport(
        name=request.name, documents=read, kept=len(rows), dropped=dropped, tokens=sum(len(row.ids) for row in kept),
        tokens_cut=cut, rows=len(kept), rows_asked=request.rows,
    )  # fmt: skip


def blank_row(processor: "ProcessorMixin", tokens: int) -> Made:
    """A row of at most so many tokens with a grey image, to learn from what a model makes of one.

    Raises:
        DataError: the processor has no chat template, or refuses such a chat.
    """
    from PIL import Image

    parts = [{"type": "image", "image": Image.new("RGB", (64, 64), (128, 128, 128))}, {"type": "text", "text": "."}]
    return shortened(_processed([{"role": "user", "content": parts}], processor, "a grey image"), tokens)


def made(inputs: Mapping[str, Tensor], where: str) -> Made:
    """A row of what a processor returns for one conversation.

    Args:
        inputs: input_ids (1, T), and other arguments of the model.
        where: for messages.

    Raises:
        DataError: not the token ids of one row.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1:
        found = f"input_ids of shape {list(ids.shape)}" if isinstance(ids, Tensor) else "no tensor input_ids"
        raise DataError(f"{where}: found {found}; needed [1, tokens], as a processor returns for one row")
    return Made(ids[0].tolist(), {name: each for name, each in inputs.items() if name not in _OF_TEXT})


def shortened(row: Made, tokens: int) -> Made:
    """A row of at most so many tokens."""
    if len(row.ids) <= tokens:
        return row
    size = len(row.ids)
    extras = {name: each[:, :tokens] if _by_token(each, size) else each for name, each in row.extras.items()}
    return Made(row.ids[:tokens], extras)


def completed(rows: Sequence[Made], width: int) -> tuple[Extras, ...]:
    """The arguments of all rows, where some have images and others none: what has one entry a row gets one in each.

    Most models take the images of all rows in one list. Those that are told by token what images it sees, as Mllama
    is, take them row by row, also of rows that have none.

    Args:
        rows: in their order.
        width: tokens in a row; arguments that go by tokens are filled up to it with zeros.

    Returns:
        One mapping a row; none at all where no row has images.
    """
    firsts = {name: (tensor, len(row.ids)) for row in rows for name, tensor in row.extras.items()}
    by_token = {name: tensor for name, (tensor, size) in firsts.items() if _by_token(tensor, size)}
    by_row = firsts if any(tensor.ndim > 2 for tensor in by_token.values()) else by_token
    blanks = {}
    for name in by_row:
        tensor, _ = firsts[name]
        blanks[name] = tensor.new_zeros(1, *[width if name in by_token else 0, *[0] * (tensor.ndim - 2)])
    return tuple({**blanks, **dict(_filled(row, width))} for row in rows) if any(row.extras for row in rows) else ()


def _filled(row: Made, width: int) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in row.extras.items():
        missing = width - len(row.ids)
        pads = [0, 0] * (tensor.ndim - 2) + [0, missing]
        yield name, functional.pad(tensor, pads) if missing and _by_token(tensor, len(row.ids)) else tensor


def _by_token(tensor: Tensor, tokens: int) -> bool:
    return tensor.ndim >= 2 and tuple(tensor.shape[:2]) == (1, tokens)


def _messages(document: Document, spec: DatasetSpec) -> list[dict[str, Any]]:
    """In the form that processors take, images opened."""
    if not isinstance(document, Pictured):
        return [{"role": each["role"], "content": [{"type": "text", "text": each["content"]}]}
                for each in conversation(document, spec.system_prompt)]  # fmt: skip
    messages = [{"role": role, "content": [_part(part, document.where) for part in parts]}
                for role, parts in document.messages]  # fmt: skip
    if spec.system_prompt is None:
        return messages
    rest = [message for message in messages if message["role"] != "system"]
    own = [{"role": "system", "content": [{"type": "text", "text": spec.system_prompt}]}] if spec.system_prompt else []
    return own + rest


def _part(part: str | Path, where: str) -> dict[str, Any]:
    from PIL import Image

    if isinstance(part, str):
        return {"type": "text", "text": part}
    try:
        with Image.open(part) as image:
            return {"type": "image", "image": image.convert("RGB")}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: found an image that cannot be read, {part} ({error}); replace the file") from error


def _processed(messages: list[dict[str, Any]], processor: "ProcessorMixin", where: str) -> Made:
    from jinja2.exceptions import TemplateError

    opens_answer = not messages or messages[-1]["role"] != "assistant"
    try:
        found: Any = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=opens_answer
        )
    except (TemplateError, ValueError, TypeError, IndexError) as error:
        raise DataError(f"{where}: found a conversation that the processor refuses ({error}); correct it") from error
    return made({name: each for name, each in found.items() if isinstance(each, torch.Tensor)}, where)
