"""What an evaluation found, as a table and as JSON. Torch-free."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from autoround.tables import aligned, cells, tail

# The name of the model that others are compared with.
FLOAT = "float"
# Numbers from here on are shown by their leading digits.
_LONG = 10_000
# Letters before a token that are shown in any case.
LEAST_CONTEXT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One number.

    Attributes:
        task: what was asked.
        metric: what was counted.
        value: the number.
        error: its standard error; None where there is none.
    """

    task: str
    metric: str
    value: float
    error: float | None = None

    def __str__(self) -> str:
        return _short(self.value) + ("" if self.error is None else f" +- {_short(self.error)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstToken:
    """A place in the text where a model's prediction is far from the float model's.

    Attributes:
        kl: divergence there, in nats.
        row, place: of the predicted token in the text's rows, from 0.
        context: the end of the text before it.
        token: the token that came.
        float_choice: what the float model ranks first.
        choice: what the model ranks first.
        float_nll, nll: negative log likelihoods of the token that came, in nats.
    """

    kl: float
    row: int
    place: int
    context: str
    token: str
    float_choice: str
    choice: str
    float_nll: float
    nll: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelResults:
    """What was found of one model; ``float`` is the name of the one it is compared with."""

    name: str
    measures: tuple[Measure, ...]
    worst: tuple[WorstToken, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What was found of all models.

    Attributes:
        models: the float model first, if it was evaluated.
        reference: the float model that others are compared with; empty where there is none.
        text: what kl and perplexity were measured on; empty without them.
        failed: "model, task" -> why, of tasks that did not finish.
        settings: all that were set.
        complete: whether nobody stopped it before its end.
    """

    models: tuple[ModelResults, ...]
    reference: str = ""
    text: str = ""
    failed: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = True

    def table(self, width: int | None = None) -> str:
        """Measures in rows, models in columns, and the worst tokens below.

        Args:
            width: of the terminal; models that do not fit are in a table of their own below. No limit when None.

        >>> ppl = Measure(task="perplexity", metric="per token", value=9.0, error=0.5)
        >>> print(Results(models=(ModelResults(name="float", measures=(ppl,)),)).table())
        task        metric     float
        perplexity  per token  9.0000 +- 0.5000
        """
        known = reversed(self.models)  # the float model, which comes first, has no kl
        found_by: dict[tuple[str, str], dict[str, str]] = {
            (each.task, each.metric): {} for model in known for each in model.measures
        }
        for model in self.models:
            for each in model.measures:
                found_by[each.task, each.metric][model.name] = str(each)
        first = [["task", "metric"], *map(list, found_by)]
        columns = [[model.name, *(found.get(model.name, "") for found in found_by.values())] for model in self.models]
        parts = _side_by_side(first, columns, width)
        if self.text:
            parts.append([f"kl and perplexity on {self.text}"])
        parts += [
            [f"worst tokens of {model.name}", *_worst(model.worst, width)] for model in self.models if model.worst
        ]
        parts += [[f"{name}: failed: {reason}"] for name, reason in self.failed.items()]
        return "\n\n".join("\n".join(lines) for lines in parts)

    def json(self) -> str:
        """Everything, with numbers in full."""
        return json.dumps(
            {
                "reference": self.reference,
                "text": self.text,
                "models": {
                    model.name: {
                        "tasks": _nested(model.measures),
                        "worst_tokens": [asdict(each) for each in model.worst],
                    }
                    for model in self.models
                },
                "complete": self.complete,
                "failed": dict(self.failed),
                "settings": dict(self.settings),
            },
            indent=2,
            ensure_ascii=False,
        )


class Interrupted(KeyboardInterrupt):
    """An evaluation was stopped; ``results`` are those of the tasks that were finished."""

    def __init__(self, results: Results) -> None:
        super().__init__()
        self.results = results


def _short(number: float) -> str:
    return f"{number:.4f}" if abs(number) < _LONG else f"{number:.4g}"


def _side_by_side(first: list[list[str]], columns: list[list[str]], width: int | None) -> list[list[str]]:
    """The first columns and as many of the others as fit beside them, and so on below."""
    tables, rows, count = list[list[str]](), first, 0
    for column in columns:
        wider = [[*row, cell] for row, cell in zip(rows, column, strict=True)]
        if count and width is not None and max(map(cells, aligned(wider))) > width:
            tables.append(aligned(rows, width))
            wider, count = [[*row, cell] for row, cell in zip(first, column, strict=True)], 0
        rows, count = wider, count + 1
    return [*tables, aligned(rows, width)]


def _worst(tokens: Sequence[WorstToken], width: int | None) -> list[str]:
    """Places of the worst tokens; what comes before them takes the room that the other columns leave."""
    sides = [
        [f"{each.kl:.3f}", f"{each.row}:{each.place}", repr(each.token), repr(each.float_choice), repr(each.choice)]
        for each in tokens
    ]
    head = ["kl", "row:place", "came", "float", "here"]
    room = None if width is None else max(width - max(map(cells, aligned([head, *sides]))) - 2, LEAST_CONTEXT)
    before = [repr(each.context) if room is None else tail(repr(each.context), room) for each in tokens]
    rows = [[*row[:2], text, *row[2:]] for row, text in zip([head, *sides], ["text", *before], strict=True)]
    return aligned(rows, width)


def _nested(measures: tuple[Measure, ...]) -> dict[str, dict[str, dict[str, float | None]]]:
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for each in measures:
        found.setdefault(each.task, {})[each.metric] = {"value": each.value, "stderr": each.error}
    return found
