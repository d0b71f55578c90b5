"""Calibration data of any kind -> one tensor of token rows with its mask. Dims: N rows, T tokens in a row."""

import dataclasses
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor

from autoround.data.encode import encode, find_specials
from autoround.data.images import DROPPED, Extras, Made, completed, fitting, made, rows_with_images, shortened
from autoround.data.language import DatasetSpec, parse_specs
from autoround.data.packing import Row, RowRequest, pack_rows, row_per_document
from autoround.data.records import Document, Pictured, read_record
from autoround.data.report import CalibrationReport, SourceReport
from autoround.data.sources import open_source
from autoround.data.written import SELF, Writer, written_rows
from autoround.errors import DataError, UsageError
from autoround.log import LOGGER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_DATASET = "NeelNanda/pile-10k"

Dataset: TypeAlias = str | Tensor | Sequence[object]
"""Mini-language text, a [N, T] tensor of ids, or a sequence of specs, of texts and records, of rows of ids, or of what
a processor returns for a row."""


class Calibration(NamedTuple):
    """Rows to calibrate on.

    Args:
        tokens_NT: int64 token ids; padding holds EOS, or 0 where there is no EOS.
        valid_NT: bool, False on padding, which is always at the end of a row.
        report: what was read, kept and dropped.
        extras: for each row the model's other arguments, such as pixels; empty where no row has images.
    """

    tokens_NT: Tensor
    valid_NT: Tensor
    report: CalibrationReport
    extras: tuple[Extras, ...] = ()

    def first(self, rows: int) -> "Calibration":
        """That many of them."""
        return self._replace(tokens_NT=self.tokens_NT[:rows], valid_NT=self.valid_NT[:rows], extras=self.extras[:rows])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that decides what is learned, by name."""
        yield from (("tokens", self.tokens_NT), ("valid", self.valid_NT))
        for row, extras in enumerate(self.extras):
            yield from ((f"{row}.{name}", extras[name]) for name in sorted(extras))


class _Job(NamedTuple):
    """The settings of one ``load_calibration`` call that its steps share."""

    tokenizer: "PreTrainedTokenizerBase | None"
    nsamples: int
    seqlen: int
    seed: int
    vocab_size: int
    writer: Writer | None


def load_calibration(
    dataset: Dataset | None,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    nsamples: int,
    seqlen: int,
    batch_size: int,
    seed: int,
    writer: Writer | None = None,
) -> Calibration:
    """Read, shuffle, tokenize and pack calibration data; equal arguments and data give equal rows.

    Fewer rows than wanted, and other choices made for the user, are warnings of the logger ``autoround``.

    Args:
        dataset: mini-language text; a sequence of ``DatasetSpec``; a sequence of texts, chats or records, packed like
            a file of them; a sequence of rows of ids (integer tensors [T] or [1, T], or lists of int) or an integer
            tensor [N, T], one row each; a sequence of what a processor returns for one conversation. None is
            ``DEFAULT_DATASET``.
        tokenizer: of the model to be quantized; rows of ids need none.
        nsamples: rows wanted, at least 1. Items with ``num`` give that many, the others share the rest evenly.
        seqlen: tokens in a row; rows of ids that are all shorter give rows as long as the longest.
        batch_size: rows of one tuning step; fewer rows than this (or than nsamples, if smaller) are an error.
        seed: of the order of documents and rows.
        writer: the model to be quantized: it says which ids are allowed, writes the rows of the source ``self``, and
            has the processor that reads images; without it the tokenizer's vocabulary is allowed.

    Raises:
        UsageError: malformed mini-language, or more items than rows.
        DataError: data that cannot be read, too little of it, or ids outside the vocabulary.
    """
    for name, value in (("nsamples", nsamples), ("seqlen", seqlen), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name}: found {value}; needed at least 1")
    if tokenizer is None and needs_tokenizer(dataset):
        raise DataError(
            "dataset: found text and no tokenizer; needed the model's own; pass tokenizer=, or rows of token ids"
        )
    job = _Job(tokenizer, nsamples, seqlen, seed, _vocab_size(tokenizer, writer), writer)
    rows, reports, width = _read(DEFAULT_DATASET if dataset is None else dataset, job)
    report = CalibrationReport(sources=tuple(reports), nsamples=nsamples, seqlen=seqlen)
    if len(rows) < min(batch_size, nsamples):
        dropped = any(reason == DROPPED for source in reports for reason, _ in source.dropped)
        advice = "raise seqlen, or lower batch_size" if dropped else "give more text, or lower seqlen or batch_size"
        raise DataError(
            f"calibration data: found {len(rows)} of {nsamples} rows of {seqlen} tokens ({_joined(report)}); needed "
            f"{min(batch_size, nsamples)}, one batch; {advice}"
        )
    if len(rows) < nsamples:
        LOGGER.warning(
            "calibration data: %d of %d rows of %d tokens (%s)", len(rows), nsamples, seqlen, _joined(report)
        )
    random.Random(seed).shuffle(rows)
    pad = 0 if tokenizer is None else find_specials(tokenizer).pad
    tokens_NT, valid_NT = _tensors([row.ids for row in rows], width, pad=pad)
    return Calibration(tokens_NT, valid_NT, report, completed(rows, width))


def needs_tokenizer(dataset: Dataset | None) -> bool:
    """Whether a dataset is text rather than rows of token ids."""
    if isinstance(dataset, Tensor):
        return False
    if dataset is None or isinstance(dataset, str):
        return True
    return len(dataset) > 0 and not (isinstance(dataset[0], Tensor) or _is_ids(dataset[0]) or _is_processed(dataset[0]))


def share_rows(nums: Sequence[int | None], nsamples: int) -> list[int]:
    """Return the rows each item gives: its ``num``, or an even share of what the numbers leave.

    Numbers that together exceed ``nsamples`` are scaled down in proportion, with a warning.

    Raises:
        UsageError: an item would give no row.
    """
    asked = sum(num for num in nums if num is not None)
    unnumbered = sum(num is None for num in nums)
    if asked > nsamples and not unnumbered:
        ends = [sum(num or 0 for num in nums[:end]) * nsamples // asked for end in range(len(nums) + 1)]
        shares = [end - start for start, end in itertools.pairwise(ends)]
    else:
        left, free = max(0, nsamples - asked), iter(range(unnumbered))
        shares = [(left + unnumbered - 1 - next(free)) // unnumbered if num is None else num for num in nums]
    if not all(shares):
        raise UsageError(
            f"dataset: found {len(nums)} items, {len(nums) - unnumbered} of them with num= ({asked} rows), "
            f"for {nsamples} rows; needed at least one row for each; raise nsamples or lower num="
        )
    if sum(shares) < asked:
        LOGGER.warning(
            "dataset: num= asks for %d rows, nsamples is %d; taking %s", asked, nsamples, " + ".join(map(str, shares))
        )
    return shares


def _read(dataset: Dataset, job: _Job) -> tuple[list[Made], list[SourceReport], int]:
    """Rows of a dataset of any kind, their reports, and the width of the tensor to make."""
    if isinstance(dataset, str):
        return _from_specs(parse_specs(dataset), job)
    if isinstance(dataset, Tensor):
        if dataset.ndim != 2:
            raise DataError(f"dataset: found a tensor of shape {list(dataset.shape)}; needed [rows, tokens]")
        return _from_ids([_ids(row, index) for index, row in enumerate(dataset)], job)
    if len(dataset) == 0:
        raise DataError("dataset: found an empty sequence; needed texts, rows of token ids or dataset specs")
    if _all_specs(dataset):
        return _from_specs(dataset, job)
    first = dataset[0]
    if isinstance(first, Tensor) or _is_ids(first):
        return _from_ids([_ids(row, index) for index, row in enumerate(dataset)], job)
    if _is_processed(first):
        return _from_made([_made(row, index) for index, row in enumerate(dataset)], "processed rows", job)
    return _from_records(dataset, job)


def _all_specs(dataset: Sequence[object]) -> TypeGuard[Sequence[DatasetSpec]]:
    return all(isinstance(item, DatasetSpec) for item in dataset)


def _is_ids(row: object) -> bool:
    return isinstance(row, Sequence) and not isinstance(row, str) and all(isinstance(item, int) for item in row)


def _is_processed(row: object) -> bool:
    return isinstance(row, Mapping) and "input_ids" in row


def _from_specs(specs: Sequence[DatasetSpec], job: _Job) -> tuple[list[Made], list[SourceReport], int]:
    rows: list[Made] = []
    reports: list[SourceReport] = []
    shares = share_rows([spec.num for spec in specs], job.nsamples)
    for index, (spec, share) in enumerate(zip(specs, shares, strict=True)):
        seed = f"{job.seed}:{index}"
        if spec.name == SELF:
            assert job.tokenizer is not None, "text needs a tokenizer"
            written, report = written_rows(spec, job.writer, job.tokenizer, rows=share, tokens=job.seqlen, seed=seed)
            own = [Made(row) for row in written]
        else:
            source = open_source(spec, rng=random.Random(seed), rows=share)
            own, report = _rows_of(source.documents, spec, share, job=job)
            report = dataclasses.replace(report, origin=source.origin)
        rows += own
        reports.append(report)
    return rows, reports, job.seqlen


def _from_records(records: Sequence[object], job: _Job) -> tuple[list[Made], list[SourceReport], int]:
    # a list of messages is a chat: the record that a file would hold
    found = [
        read_record({"messages": record} if isinstance(record, list) else record, where=f"dataset[{index}]")
        for index, record in enumerate(records)
    ]
    random.Random(f"{job.seed}:0").shuffle(found)
    spec = DatasetSpec(name=f"a list of {len(found)} texts")
    rows, report = _rows_of(found, spec, job.nsamples, job=job)
    return rows, [report], job.seqlen


def _rows_of(found: Iterable[Document], spec: DatasetSpec, share: int, *, job: _Job) -> tuple[list[Made], SourceReport]:
    """Packed rows of text; where one of the first documents has images, a row for each document."""
    assert job.tokenizer is not None, "text needs a tokenizer"
    stream = iter(found)
    firsts = list(itertools.islice(stream, share))
    found = itertools.chain(firsts, stream)
    if (pictured := next((each for each in firsts if isinstance(each, Pictured)), None)) is not None:
        if job.writer is None:
            raise DataError(
                f"{pictured.where}: found images and no model to read them with; needed its processor, or text alone"
            )
        request = RowRequest(spec.name, share, job.seqlen)
        rows, report = rows_with_images(found, request, job.writer.processor(), spec=spec)
        return _checked(rows, report, spec, job), report
    specials = find_specials(job.tokenizer)
    encoded = encode(iter(found), job.tokenizer, spec=spec, specials=specials)
    request = RowRequest(spec.name, share, job.seqlen)
    if spec.concat is False:
        packed, report = row_per_document(encoded, request, prefix=specials.prefix)
    else:
        packed, report = pack_rows(encoded, request, specials=specials)
    return _checked([Made(row) for row in packed], report, spec, job), report


def _checked(rows: list[Made], report: SourceReport, spec: DatasetSpec, job: _Job) -> list[Made]:
    if not rows:
        raise _too_little(report, job.seqlen)
    _check_vocabulary([row.ids for row in rows], job.vocab_size, where=f"dataset {spec.name!r}, row ")
    return rows


def _too_little(report: SourceReport, seqlen: int) -> DataError:
    """A source that gives no row is an error, also beside others."""
    where = f"dataset {report.name!r}"
    if not report.documents:
        return DataError(f"{where}: found no documents; needed some text; check the file or its split")
    if not report.tokens_cut:
        return DataError(f"{where}: found no text in {report.documents} documents; needed some; check column=")
    return DataError(
        f"{where}: found {report.tokens_cut} tokens; needed {max(1, seqlen // 4)}, a quarter of a row; "
        "give more text or lower seqlen"
    )


def _vocab_size(tokenizer: "PreTrainedTokenizerBase | None", writer: Writer | None) -> int:
    if writer is not None:
        return writer.vocab_size
    return 2**31 if tokenizer is None else 1 + max(tokenizer.get_vocab().values(), default=-1)


def _from_ids(ids: list[Row], job: _Job) -> tuple[list[Made], list[SourceReport], int]:
    return _from_made([Made(row) for row in ids], "rows of token ids", job)


def _from_made(found: list[Made], kind: str, job: _Job) -> tuple[list[Made], list[SourceReport], int]:
    _check_vocabulary([row.ids for row in found], job.vocab_size, where="dataset, row ")
    random.Random(f"{job.seed}:0").shuffle(found)
    request = RowRequest(f"{len(found)} {kind}", job.nsamples, job.seqlen)
    found = fitting(found, job.seqlen)
    _, report = row_per_document((row.ids for row in found), request)
    if report.tokens_cut:
        LOGGER.warning("dataset: %d token ids lie beyond seqlen %d and are cut off", report.tokens_cut, job.seqlen)
    rows = [shortened(row, job.seqlen) for row in found if row.ids][: job.nsamples]
    return rows, [report], max((len(row.ids) for row in rows), default=0)


def _made(row: object, index: int) -> Made:
    if not isinstance(row, Mapping):
        raise DataError(f"dataset[{index}]: found {type(row).__name__}; needed a mapping, as the first item is")
    return made(row, f"dataset[{index}]")


def _ids(row: object, index: int) -> Row:
    """A row of ids as a list of int."""
    if isinstance(row, Tensor):
        if row.ndim == 2 and row.shape[0] == 1:
            row = row[0]
        if row.ndim != 1 or row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise DataError(f"dataset[{index}]: found {row.dtype} of shape {list(row.shape)}; needed token ids [T]")
        ids: list[int] = row.tolist()
        return ids
    if isinstance(row, Sequence) and not isinstance(row, str):
        found = [item for item in row if isinstance(item, int) and not isinstance(item, bool)]
        if len(found) == len(row):
            return found
    raise DataError(f"dataset[{index}]: found {type(row).__name__}; needed a row of token ids, as the first item is")


def _check_vocabulary(rows: list[Row], vocab_size: int, *, where: str) -> None:
    for index, row in enumerate(rows):
        if row and (min(row) < 0 or max(row) >= vocab_size):
            wrong = next(token for token in row if not 0 <= token < vocab_size)
            raise DataError(
                f"{where}{index}: found token id {wrong}; needed 0 to {vocab_size - 1}; use the tokenizer of this model"
            )


def _tensors(rows: list[Row], width: int, *, pad: int) -> tuple[Tensor, Tensor]:
    tokens_NT = torch.full((len(rows), width), pad, dtype=torch.int64)
    valid_NT = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens_NT[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        valid_NT[index, : len(row)] = True
    return tokens_NT, valid_NT


def _joined(report: CalibrationReport) -> str:
    return "; ".join(str(source) for source in report.sources)
