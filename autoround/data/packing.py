"""Token ids of documents -> rows: packed one after another, or one document a row. Torch-free."""

from collections.abc import Iterable
from typing import NamedTuple

from autoround.data.encode import Specials
from autoround.data.report import SourceReport
from autoround.errors import DataError

Row = list[int]


class RowRequest(NamedTuple):
    """How many rows of how many tokens are wanted of the source ``name``."""

    name: str
    rows: int
    seqlen: int


def pack_rows(
    documents: Iterable[list[int]], request: RowRequest, *, specials: Specials
) -> tuple[list[Row], SourceReport]:
    """Join documents by the separator and cut rows of ``seqlen`` tokens, each led by the tokenizer's prefix.

    No token between two documents is lost: a document goes on in the next row. Only a last row of less than
    seqlen // 4 tokens is dropped.

    Args:
        documents: token ids without prefix; read until the rows are full.
        request: rows wanted and tokens in each.
        specials: prefix and separator.

    Returns:
        At most ``request.rows`` rows of ``seqlen`` tokens, the last one perhaps shorter, and the counts.

    Raises:
        DataError: seqlen leaves no room beside the prefix.
    """
    room = _room(request, specials)
    stream: list[int] = []
    starts: list[int] = []
    read = 0
    for ids in documents:
        read += 1
        if not ids:
            continue
        starts.append(len(stream))
        stream += ids
        if specials.eos is None or specials.eos not in ids:  # chat templates end every turn themselves
            stream += specials.separator
        if len(stream) >= request.rows * room:
            break
    full = min(request.rows, len(stream) // room)
    rows = [[*specials.prefix, *stream[index * room : (index + 1) * room]] for index in range(full)]
    tail = stream[full * room :] if full < request.rows else []
    used = full * room
    if tail and len(specials.prefix) + len(tail) >= request.seqlen // 4:
        rows.append([*specials.prefix, *tail])
        used += len(tail)
    kept = sum(start < used for start in starts)
    dropped = {"empty": read - len(starts), "in a last row too short to keep": len(starts) - kept}
    return rows, _report(request, rows, read=read, dropped=dropped, cut=len(tail) if used == full * room else 0)


def row_per_document(
    documents: Iterable[list[int]], request: RowRequest, *, prefix: tuple[int, ...] = ()
) -> tuple[list[Row], SourceReport]:
    """Make every document one row, cut to ``seqlen`` tokens; shorter documents give shorter rows.

    Args:
        documents: token ids without prefix; read until there are enough rows.
        request: rows wanted and tokens in each.
        prefix: ids before every document.
    """
    rows: list[Row] = []
    read = cut = 0
    for ids in documents:
        read += 1
        if not ids:
            continue
        row = [*prefix, *ids]
        rows.append(row[: request.seqlen])
        cut += max(0, len(row) - request.seqlen)
        if len(rows) == request.rows:
            break
    return rows, _report(request, rows, read=read, dropped={"empty": read - len(rows)}, cut=cut)


def _room(request: RowRequest, specials: Specials) -> int:
    room = request.seqlen - len(specials.prefix)
    if room < 1:
        raise DataError(
            f"seqlen: found {request.seqlen}; needed more than {len(specials.prefix)}, "
            "which the tokenizer itself puts at the start of every row"
        )
    return room


def _report(request: RowRequest, rows: list[Row], *, read: int, dropped: dict[str, int], cut: int) -> SourceReport:
    return SourceReport(
        name=request.name,
        documents=read,
        kept=read - sum(dropped.values()),
        dropped=tuple((reason, count) for reason, count in dropped.items() if count),
        tokens=sum(map(len, rows)),
        tokens_cut=cut,
        rows=len(rows),
        rows_asked=request.rows,
    )
