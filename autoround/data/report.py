"""What became of the calibration text: counts for every source. Torch-free."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceReport:
    """Counts of one source.

    Args:
        name: the dataset as the user named it.
        documents: documents read until the rows were full.
        kept: documents with at least one token in a row.
        dropped: pairs of a reason and the number of documents dropped for it; kept + dropped = documents.
        tokens: tokens in the rows, special ones included, padding not.
        tokens_cut: tokens read and left out: beyond a row of their own, or in a last row too short to keep.
        rows: rows made.
        rows_asked: rows that were this source's share.
        images: images in the rows.
        origin: in words where the documents come from; empty for data passed in.
    """

    name: str
    documents: int
    kept: int
    dropped: tuple[tuple[str, int], ...]
    tokens: int
    tokens_cut: int
    rows: int
    rows_asked: int
    images: int = 0
    origin: str = ""

    def __str__(self) -> str:
        dropped = "".join(f", {count} dropped ({reason})" for reason, count in self.dropped)
        cut = f", {self.tokens_cut} tokens cut off" if self.tokens_cut else ""
        images = f", {self.images} images" if self.images else ""
        return (
            f"{self.name}: {self.rows} of {self.rows_asked} rows, {self.tokens} tokens{images} "
            f"from {self.kept} documents{dropped}{cut}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationReport:
    """Counts of every source, the rows asked for and the tokens in a row; ``str`` gives one line a source."""

    sources: tuple[SourceReport, ...]
    nsamples: int
    seqlen: int

    @property
    def rows(self) -> int:
        """Rows of all sources together."""
        return sum(source.rows for source in self.sources)

    @property
    def tokens(self) -> int:
        """Tokens of all sources together, padding not counted."""
        return sum(source.tokens for source in self.sources)

    def __str__(self) -> str:
        return "\n".join(str(source) for source in self.sources)
