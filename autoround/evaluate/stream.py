"""Perplexity and KL divergence block by block: of any model, one block's weights are in memory at a time.

Hidden states of all rows are kept and pass through the blocks one after another; what follows the last block, up to the
logits, works on single tokens and takes a few of them at a time.

Legend: N rows, B rows in a batch, T tokens in a row, P predicted tokens, C of them in a chunk, D hidden size,
V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from autoround import func
from autoround.backends.products import float32_products
from autoround.errors import DataError, ModelError
from autoround.evaluate.scores import TokenScores, join, score
from autoround.model.blocks import embedding, find_blocks
from autoround.model.capture import capture
from autoround.model.load import OpenModel
from autoround.model.outputs import Outputs, chunk_tokens, count_items
from autoround.model.read import read_block
from autoround.progress import EvaluationMeter, Progress
from autoround.ranks import ALONE, Ranks, owners


class Rows(NamedTuple):
    """Text to score on.

    Attributes:
        tokens_NT: int64 token ids; each row is scored on its own.
        valid_NT: bool, False on padding.
    """

    tokens_NT: Tensor
    valid_NT: Tensor

    @property
    def places_P2(self) -> Tensor:
        """Row and column of every token that is predicted: all valid ones that follow a valid one."""
        followed_NT = self.valid_NT[:, :-1] & self.valid_NT[:, 1:]
        return followed_NT.nonzero() + torch.tensor([0, 1])

    def share(self, ranks: Ranks, batch_size: int) -> "Rows":
        """Those of one rank: neighbours, in whole batches."""
        rows = len(self.tokens_NT)
        owner_N = torch.tensor(owners(-(-rows // batch_size), ranks.size)).repeat_interleave(batch_size)[:rows]
        return Rows(*(field[owner_N == ranks.rank] for field in self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """How blocks run.

    Attributes:
        batch_size: rows in a forward.
        device: where.
        dtype: in which floating-point dtype.
        memory: counts the bytes held there.
        ranks: processes that share the rows; all of them return the scores of all.
    """

    batch_size: int = 4
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    dtype: torch.dtype = torch.float32
    memory: Callable[[], int] = int
    ranks: Ranks = ALONE


class Streamed(NamedTuple):
    """Scores of a model, and the token that it ranks first at each place, int64."""

    scores: TokenScores
    top_P: Tensor

    @classmethod
    def joined(cls, parts: Sequence["Streamed"]) -> "Streamed":
        """Those of successive tokens as one."""
        return cls(join([each.scores for each in parts]), torch.cat([each.top_P for each in parts]))


def compare_streamed(
    reference: OpenModel,
    candidates: Mapping[str, OpenModel],
    rows: Rows,
    *,
    streaming: Streaming,
    reference_name: str = "float",
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Streamed]:
    """Score candidates against a reference as ``compare`` does, without loading any of them.

    The reference runs once. Beside one block's weights or two output heads, memory holds the hidden states of all rows
    twice, in the dtype that blocks run in.

    Args:
        reference: an opened model; see ``open_checkpoint``.
        candidates: name -> model with the same vocabulary.
        rows: what to score on.
        streaming: how blocks run.
        reference_name: name of the reference's own scores in the result.
        on_progress: called before each block, and some times a second while logits are computed.

    Returns:
        name -> scores over the predicted tokens; log-probabilities are taken in float32.

    Raises:
        ModelError: vocabularies differ, or an architecture is not supported.
        DataError: no token is predicted by another one.
    """
    if not len(rows.places_P2):
        raise DataError(f"evaluation text: found rows of {rows.tokens_NT.shape[1]} tokens; needed at least 2")

    own = rows.share(streaming.ranks, streaming.batch_size)
    found = {}
    if len(own.places_P2):
        found = _compare_rows(reference, candidates, own, streaming, reference_name, on_progress)
    parts = [part for part in streaming.ranks.gather(found) if part]
    return {name: Streamed.joined([part[name] for part in parts]) for name in parts[0]}


def _compare_rows(
    reference: OpenModel,
    candidates: Mapping[str, OpenModel],
    rows: Rows,
    streaming: Streaming,
    reference_name: str,
    on_progress: Callable[[Progress], None] | None,
) -> dict[str, Streamed]:
    """``compare_streamed`` of one process."""
    meter = _meter(reference, candidates, streaming, on_progress)

    def ended(name: str, model: OpenModel) -> _Ended:
        return _run_blocks(model, rows, streaming, lambda block, blocks: meter.block(name, block, blocks))

    def score_pair(index: int, name: str, candidate: _Ended | None) -> tuple[Streamed, Streamed]:
        def tell(done: int, tokens: int) -> None:
            meter.logits(name, done, tokens, (index + done / tokens) / max(len(candidates), 1))

        return _score_pair(first, candidate, rows, streaming, tell)

    first = ended(reference_name, reference)
    if not candidates:
        return {reference_name: score_pair(0, reference_name, None)[0]}
    found: dict[str, Streamed] = {}
    for index, (name, model) in enumerate(candidates.items()):
        found[reference_name], found[name] = score_pair(index, name, ended(name, model))
    return found


class _Ended(NamedTuple):
    """A model, the outputs of its last block on the CPU, and how many items that block returned."""

    model: OpenModel
    hidden_NTD: Tensor
    items: int

    def outputs(self, streaming: Streaming) -> Outputs:
        return Outputs(self.model, streaming.device, streaming.dtype, items=self.items)


def _meter(
    reference: OpenModel,
    candidates: Mapping[str, OpenModel],
    streaming: Streaming,
    listen: Callable[[Progress], None] | None,
) -> EvaluationMeter:
    """Blocks are counted; an output head is to a block as their weights are."""
    models = [reference, *candidates.values()]
    blocks = [find_blocks(model.skeleton) for model in models]
    weights = sum(each.numel() for each in reference.skeleton.get_submodule(blocks[0][0]).parameters())
    head = reference.config.get_text_config().vocab_size * embedding(reference.skeleton).in_features
    heads = 2 * len(candidates) or 1
    return EvaluationMeter(sum(map(len, blocks)), heads * head / weights, streaming.memory, listen)


def _run_blocks(model: OpenModel, rows: Rows, streaming: Streaming, on_block: Callable[[int, int], None]) -> _Ended:
    """Pass all rows through all blocks."""
    blocks, device = find_blocks(model.skeleton), streaming.device
    hidden_NTD, templates = capture(model, *rows, batch_size=streaming.batch_size, device=device, dtype=streaming.dtype)
    items: list[int] = []
    for index, (path, template) in enumerate(zip(blocks, templates, strict=True)):
        on_block(index + 1, len(blocks))
        block_fn = func.make_block_fn(model.skeleton.get_submodule(path))
        count_items(block_fn.skeleton, items)
        tensors = read_block(model, path, dtype=streaming.dtype, device=device)
        before_NTD = hidden_NTD
        with torch.no_grad(), float32_products(device):
            for rows_B in torch.split(torch.arange(len(before_NTD)), streaming.batch_size):
                output_BTD = block_fn(tensors, template.bind(before_NTD[rows_B].to(device), rows_B))
                if output_BTD.shape[2:] != hidden_NTD.shape[2:]:  # it hands something to later blocks
                    hidden_NTD = before_NTD.new_empty(*before_NTD.shape[:2], *output_BTD.shape[2:])
                hidden_NTD[rows_B] = output_BTD.to(hidden_NTD)
    return _Ended(model, hidden_NTD, items[-1])


@torch.no_grad()
def _score_pair(
    reference: _Ended, candidate: _Ended | None, rows: Rows, streaming: Streaming, tell: Callable[[int, int], None]
) -> tuple[Streamed, Streamed]:
    """The reference's own scores and the candidate's, or twice its own; tells how many tokens of all are scored."""
    ours, theirs = reference.outputs(streaming), candidate and candidate.outputs(streaming)
    parts: tuple[list[TokenScores], list[TokenScores]] = [], []
    tops: tuple[list[Tensor], list[Tensor]] = [], []
    places_P2, done = rows.places_P2, 0
    tell(done, len(places_P2))
    for places_C2 in torch.split(places_P2, chunk_tokens(reference.model)):
        row_C, column_C = places_C2.unbind(1)
        next_C = rows.tokens_NT[row_C, column_C].to(streaming.device)
        with float32_products(streaming.device):
            expected_CV = ours.log_probabilities(reference.hidden_NTD[row_C, column_C - 1])
            found = [expected_CV, expected_CV]
            if candidate is not None and theirs is not None:
                found[1] = theirs.log_probabilities(candidate.hidden_NTD[row_C, column_C - 1])
        if candidate is not None:
            _check_vocabularies(reference.model, candidate.model, *found)
        for log_CV, scores, top in zip(found, parts, tops, strict=True):
            own = score(expected_CV, log_CV, next_C)
            scores.append(TokenScores(*(field.cpu() for field in own)))
            top.append(log_CV.argmax(-1).cpu())
        done += len(places_C2)
        tell(done, len(places_P2))
    first, second = (Streamed(join(scores), torch.cat(top)) for scores, top in zip(parts, tops, strict=True))
    return first, second


def _check_vocabularies(reference: OpenModel, candidate: OpenModel, expected_CV: Tensor, log_CV: Tensor) -> None:
    if expected_CV.shape != log_CV.shape:
        raise ModelError(
            f"{candidate.name}: found a vocabulary of {log_CV.shape[1]} tokens; needed the {expected_CV.shape[1]} of "
            f"{reference.name}; give the model that it was made from as reference"
        )
