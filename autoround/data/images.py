"""Chats with images -> token rows and what a model needs beside them, through the model's own processor.

Legend: N rows, T tokens in a row.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from autoround.data.encode import conversation, undated
from autoround.data.language import DatasetSpec
from autoround.data.packing import Row, RowRequest
from autoround.data.pictures import Part
from autoround.data.records import Document, Pictured
from autoround.data.report import SourceReport
from autoround.errors import DataError
from autoround.log import LOGGER

if TYPE_CHECKING:
    from transformers import ProcessorMixin

Extras: TypeAlias = Mapping[str, Tensor]
DROPPED = "longer than seqlen, with images"
_OF_TEXT = ("input_ids", "attention_mask")


class Made(NamedTuple):
    """A row: its token ids, and the model's other arguments for it by name."""

    ids: Row
    extras: Extras = {}  # noqa: RUF012


def rows_with_images(
    documents: Iterable[Document], request: RowRequest, processor: "ProcessorMixin", *, spec: DatasetSpec
) -> tuple[list[Made], SourceReport]:
    """Make every document one row. Longer ones than ``seqlen`` are cut where they have no image, else dropped with a
    warning.

    Args:
        documents: texts and chats, with images or without; read until there are enough rows.
        request: rows wanted and tokens in each.
        processor: of the model; its chat template renders all of them.
        spec: where they come from.

    Raises:
        DataError: an image that cannot be read, a conversation that the processor refuses, a processor without a chat
            template, or rows with images that are all too long.
    """
    if spec.apply_chat_template is False or processor.chat_template is None:
        found = "apply_chat_template=False" if processor.chat_template else "a processor without a chat template"
        raise DataError(f"dataset {spec.name!r}: found {found}; images need a template; leave them out")
    rows: list[Made] = []
    too_long: list[int] = []
    read = cut = images = 0
    for document in documents:
        read += 1
        own = _processed(_messages(document, spec), processor, f"dataset {spec.name!r}, document {read}")
        beyond, shown = max(0, len(own.ids) - request.seqlen), document.images if isinstance(document, Pictured) else 0
        cut += beyond
        if beyond and shown:
            too_long.append(len(own.ids))
        else:
            rows.append(own)
            images += shown
        if len(rows) == request.rows:
            break
    _tell_dropped(f"dataset {spec.name!r}", too_long, read, request.seqlen)
    dropped = ((DROPPED, len(too_long)),) if too_long else ()
    kept = [shortened(row, request.seqlen) for row in rows]
    return kept, SourceReport(
        name=request.name, documents=read, kept=len(rows), dropped=dropped, tokens=sum(len(row.ids) for row in kept),
        tokens_cut=cut, rows=len(kept), rows_asked=request.rows, images=images,
    )  # fmt: skip


def fitting(rows: Sequence[Made], tokens: int) -> list[Made]:
    """The rows that may be cut to so many tokens; those whose images need more are dropped with a warning.

    Raises:
        DataError: all are dropped.
    """
    kept: list[Made] = []
    too_long: list[int] = []
    for row in rows:
        if _is_cut_through(row, tokens):
            too_long.append(len(row.ids))
        else:
            kept.append(row)
    _tell_dropped("dataset", too_long, len(rows), tokens)
    return kept


def _is_cut_through(row: Made, tokens: int) -> bool:
    """Whether a cut would part tokens of images from what they stand for."""
    size = len(row.ids)
    return size > tokens and not all(_by_token(each, size) for each in row.extras.values())


def _tell_dropped(where: str, too_long: Sequence[int], read: int, seqlen: int) -> None:
    if not too_long:
        return
    advice = f"raise seqlen, {max(too_long)} suffices, or lower the size of images in preprocessor_config.json"
    if len(too_long) == read:
        raise DataError(
            f"{where}: found {read} rows with images, all longer than {seqlen} tokens; needed shorter ones; {advice}"
        )
    LOGGER.warning(
        "%s: dropped %d of %d rows, whose images make them longer than %d tokens; %s",
        where, len(too_long), read, seqlen, advice,
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


def _part(part: Part, where: str) -> dict[str, Any]:
    from PIL import Image

    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Image.Image):
        return {"type": "image", "image": part.convert("RGB")}
    named = f", {part}" if isinstance(part, Path) else ""
    try:
        with Image.open(BytesIO(part) if isinstance(part, bytes) else part) as image:
            return {"type": "image", "image": image.convert("RGB")}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{where}: found an image that cannot be read{named} ({error}); replace it, or take the row out"
        ) from error


def _processed(messages: list[dict[str, Any]], processor: "ProcessorMixin", where: str) -> Made:
    from jinja2.exceptions import TemplateError

    opens_answer = not messages or messages[-1]["role"] != "assistant"
    try:
        found: Any = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=opens_answer,
            chat_template=undated(processor.chat_template))  # fmt: skip
    except (TemplateError, ValueError, TypeError, IndexError) as error:
        raise DataError(f"{where}: found a conversation that the processor refuses ({error}); correct it") from error
    return made({name: each for name, each in found.items() if isinstance(each, torch.Tensor)}, where)
