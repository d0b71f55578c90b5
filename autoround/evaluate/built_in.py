"""The measures that need no lm-eval: perplexity and KL divergence on held-out text, and where they are worst.

Legend: P predicted tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from autoround.data.tokens import load_calibration
from autoround.evaluate.results import FLOAT, Measure, WorstToken
from autoround.evaluate.scores import TokenScores
from autoround.evaluate.settings import Evaluation
from autoround.evaluate.stream import Rows, Streamed, Streaming, compare_streamed
from autoround.model.load import OpenModel
from autoround.progress import Progress

# Worst tokens that are told, and how many tokens of the text before each.
WORST, CONTEXT = 10, 16
_SEED = 42


class BuiltIn(NamedTuple):
    """What was found.

    Attributes:
        text: what it was measured on, for people.
        measures: of each model, the float one included.
        worst: tokens of each model but the float one.
    """

    text: str
    measures: dict[str, tuple[Measure, ...]]
    worst: dict[str, tuple[WorstToken, ...]]


def measure_built_in(
    tasks: Sequence[str],
    models: Mapping[str, OpenModel],
    settings: Evaluation,
    *,
    reference: OpenModel | None,
    streaming: Streaming,
    tell: Callable[[str], None],
    on_progress: Callable[[Progress], None] | None = None,
) -> BuiltIn:
    """Run the built-in tasks, block by block.

    Args:
        tasks: out of kl and perplexity.
        models: name -> opened checkpoint.
        settings: text and rows.
        reference: the float model; needed for kl.
        streaming: how blocks run.
        tell: called with a line when the work begins.
        on_progress: see ``compare_streamed``.

    Raises:
        AutoRoundError: text that cannot be read, other vocabularies, or an unsupported architecture.
    """
    tokenizer = (reference or next(iter(models.values()))).tokenizer()
    rows = read_rows(settings, tokenizer)
    tell(f"evaluation: {', '.join(tasks)} of {', '.join([*([FLOAT] if reference else []), *models])}")

    def compare(first: OpenModel, others: Mapping[str, OpenModel], name: str) -> dict[str, Streamed]:
        return compare_streamed(first, others, rows, streaming=streaming, reference_name=name, on_progress=on_progress)

    if reference is not None:
        found = compare(reference, models, FLOAT)
    else:
        found = {}
        for name, model in models.items():
            found |= compare(model, {}, name)
    count, width = rows.tokens_NT.shape
    text = f"{settings.eval_dataset}: {count} rows of {width} tokens, {len(rows.places_P2):,} predicted"
    worst = {}
    if "kl" in tasks:
        worst = {name: worst_tokens(found[FLOAT], found[name], rows, tokenizer) for name in models}
    return BuiltIn(text, {name: _measures(tasks, name, each.scores) for name, each in found.items()}, worst)


def read_rows(settings: Evaluation, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """The text to measure on, as tokens; always the same ones.

    Raises:
        DataError: text that cannot be read, or too little of it.
    """
    text = load_calibration(
        settings.eval_dataset, tokenizer, nsamples=settings.rows, seqlen=settings.eval_seqlen, batch_size=1, seed=_SEED
    )
    return Rows(text.tokens_NT, text.valid_NT)


def worst_tokens(
    reference: Streamed, model: Streamed, rows: Rows, tokenizer: PreTrainedTokenizerBase
) -> tuple[WorstToken, ...]:
    """The places of largest divergence, worst first."""
    places_P2, found = rows.places_P2, []

    def text(tokens: Tensor) -> str:
        return "".join(tokenizer.decode(tokens))

    for index in model.scores.kl_P.argsort(descending=True)[:WORST].tolist():
        row, place = places_P2[index].tolist()
        before = rows.tokens_NT[row, max(0, place - CONTEXT) : place]
        found.append(
            WorstToken(
                kl=float(model.scores.kl_P[index]),
                row=row,
                place=place,
                context=text(before),
                token=text(rows.tokens_NT[row, place : place + 1]),
                float_choice=text(reference.top_P[index : index + 1]),
                choice=text(model.top_P[index : index + 1]),
                float_nll=float(reference.scores.nll_P[index]),
                nll=float(model.scores.nll_P[index]),
            )
        )
    return tuple(found)


def _measures(tasks: Sequence[str], name: str, scores: TokenScores) -> tuple[Measure, ...]:
    found = []
    if "perplexity" in tasks:
        found.append(
            Measure(task="perplexity", metric="per token", value=scores.perplexity, error=scores.perplexity_error)
        )
    if "kl" in tasks and name != FLOAT:
        found.append(Measure(task="kl", metric="nats per token", value=scores.kl, error=scores.kl_error))
        found.append(Measure(task="kl", metric="same top token", value=scores.top1, error=scores.top1_error))
    return tuple(found)
