"""What an evaluation found, as a table and as JSON. Torch-free."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# The name of the model that others are compared with.
FLOAT = "float"
# Numbers from here on are shown by their leading digits.
_LONG = 10_000


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

    def __str__(self) -> str:
        return (
            f"{self.kl:8.3f}  {self.row}:{self.place}  {self.context!r} -> {self.token!r}; "
            f"float {self.float_choice!r}, here {self.choice!r}"
        )


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

    def table(self) -> str:
        """Measures in rows, models in columns, and the worst tokens below.

        >>> ppl = Measure(task="perplexity", metric="per token", value=9.0, error=0.5)
        >>> print(Results(models=(ModelResults(name="float", measures=(ppl,)),)).table())
        task        metric     float
        perplexity  per token  9.0000 +- 0.5000
        """
        known = reversed(self.models)  # the float model, which comes first, has no kl
        cells: dict[tuple[str, str], dict[str, str]] = {
            (each.task, each.metric): {} for model in known for each in model.measures
        }
        for model in self.models:
            for each in model.measures:
                cells[each.task, each.metric][model.name] = str(each)
        names = [model.name for model in self.models]
        rows = [["task", "metric", *names]]
        rows += [[*key, *(found.get(name, "") for name in names)] for key, found in cells.items()]
        parts = ["\n".join(_aligned(rows))]
        if self.text:
            parts.append(f"kl and perplexity on {self.text}")
        for model in self.models:
            if model.worst:
                lines = (str(each) for each in model.worst)
                parts.append("\n".join([f"worst tokens of {model.name}: kl, row:place, text", *lines]))
        parts += [f"{name}: failed: {reason}" for name, reason in self.failed.items()]
        return "\n\n".join(parts)

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


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _nested(measures: tuple[Measure, ...]) -> dict[str, dict[str, dict[str, float | None]]]:
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for each in measures:
        found.setdefault(each.task, {})[each.metric] = {"value": each.value, "stderr": each.error}
    return found
