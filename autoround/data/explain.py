"""What a dataset would calibrate on: rows read, kept and dropped, and the first of them as text."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoround.data.report import CalibrationReport, SourceReport
from autoround.data.tokens import Dataset, load_calibration
from autoround.data.written import Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_CHARS = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """Counts of every source, and some rows as a model would read them.

    Attributes:
        report: the counts.
        padding: tokens that fill short rows.
        samples: the first rows decoded, special tokens included and padding not; ``str`` shows their beginnings.
    """

    report: CalibrationReport
    padding: int
    samples: tuple[str, ...]

    def __str__(self) -> str:
        report = self.report
        padding = f", {self.padding:,} of padding" if self.padding else ""
        parts = [_source(source) for source in report.sources]
        parts.append(
            f"in all: {report.rows:,} of {report.nsamples:,} rows of {report.seqlen:,} tokens: "
            f"{report.tokens:,} tokens{padding}"
        )
        parts += [f"row {number}:\n{_beginning(text)}" for number, text in enumerate(self.samples, 1)]
        return "\n\n".join(parts)


def explain(
    dataset: Dataset | None,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    samples: int = 3,
    writer: Writer | None = None,
) -> Explanation:
    """Load calibration data as a run would, and tell what became of it.

    Args:
        dataset: as ``load_calibration`` takes it.
        tokenizer: of the model to be quantized; it also decodes the samples.
        nsamples: rows wanted.
        seqlen: tokens in a row.
        seed: of the order.
        samples: rows to decode.
        writer: the model, for the source ``self``.

    Raises:
        AutoRoundError: what would stop the run.
    """
    data = load_calibration(
        dataset, tokenizer, nsamples=nsamples, seqlen=seqlen, batch_size=1, seed=seed, writer=writer
    )
    rows = zip(data.tokens_NT[:samples], data.valid_NT[:samples], strict=True)
    texts = tuple(str(tokenizer.decode(row_T[valid_T])) for row_T, valid_T in rows)
    return Explanation(report=data.report, padding=int((~data.valid_NT).sum()), samples=texts)


def _source(source: SourceReport) -> str:
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in source.dropped) or "none"
    cut = f", {source.tokens_cut:,} tokens cut off" if source.tokens_cut else ""
    images = f", {source.images:,} images" if source.images else ""
    lines = [source.name, f"  from     {source.origin or 'the caller'}", f"  read     {source.documents:,} documents"]
    lines += [f"  kept     {source.kept:,}", f"  dropped  {dropped}"]
    return "\n".join(
        [*lines, f"  made     {source.rows:,} of {source.rows_asked:,} rows, {source.tokens:,} tokens{images}{cut}"]
    )


def _beginning(text: str) -> str:
    """The first lines, indented, without what a terminal would obey."""
    left = len(text) - SHOWN_CHARS
    shown = text[:SHOWN_CHARS] + (f" … and {left:,} more characters" if left > 0 else "")
    plain = "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in shown)
    return "\n".join(f"  {line}" for line in plain.splitlines())
