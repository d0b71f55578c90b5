"""The source ``self``: rows that the model under calibration writes. Torch-free: the model is passed in."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from autoround.data.encode import find_specials
from autoround.data.language import DatasetSpec
from autoround.data.packing import Row
from autoround.data.report import SourceReport
from autoround.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

SELF = "self"


class Writer(Protocol):
    """A model that knows its vocabulary, writes rows, perhaps sees images: see ``autoround.model.sample.Sampler``."""

    @property
    def vocab_size(self) -> int: ...

    def processor(self) -> "ProcessorMixin": ...

    def sample(
        self, rows: int, tokens: int, *, prefix: Sequence[int], firsts: Sequence[int], ends: Sequence[int], seed: str
    ) -> list[list[int]]: ...


def written_rows(
    spec: DatasetSpec,
    writer: Writer | None,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    rows: int,
    tokens: int,
    seed: str,
) -> tuple[list[Row], SourceReport]:
    """Let a model write rows.

    A row begins with BOS where the tokenizer puts one before every text, and goes on as the model likes; otherwise a
    document begins with a token drawn evenly from the vocabulary, special tokens excepted.

    Args:
        spec: with a ``num`` and no other option.
        writer: the model; None is an error.
        tokenizer: of that model.
        rows: how many.
        tokens: in each row.
        seed: same seed, same rows.

    Raises:
        DataError: another option, no model to write, or what the model refuses.
    """
    for option in ("split", "concat", "apply_chat_template", "system_prompt", "config", "column"):
        if getattr(spec, option) is not None:
            raise DataError(f"dataset 'self': found {option}=; a text that the model writes has num= alone; drop it")
    if writer is None:
        raise DataError("dataset 'self': found no model to write the text; needed one; give python-docs or a file")
    specials = find_specials(tokenizer)
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    known = sorted(token for token in {*tokenizer.get_vocab().values()} - added if token < writer.vocab_size)
    made = writer.sample(
        rows,
        tokens,
        prefix=specials.prefix,
        firsts=() if specials.prefix else known,
        ends=() if specials.eos is None else (specials.eos,),
        seed=seed,
    )
    return made, SourceReport(
        name=spec.name,
        origin="written by the model itself",
        documents=rows,
        kept=rows,
        dropped=(),
        tokens=rows * tokens,
        tokens_cut=0,
        rows=rows,
        rows_asked=rows,
    )
