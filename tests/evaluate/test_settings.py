"""What an evaluation takes and refuses."""

from typing import Any

import pytest

from autoround.errors import UsageError
from autoround.evaluate.settings import Evaluation


def test_tasks_are_told_apart() -> None:
    settings = Evaluation(tasks="[kl, mmlu,lambada_openai,mmlu]")
    assert settings.tasks == ("kl", "mmlu", "lambada_openai")
    assert settings.built_in(reference=True) == ("kl",)
    assert settings.lm_eval == ("mmlu", "lambada_openai")
    assert settings.wanted
    assert not Evaluation().wanted
    assert Evaluation(eval=True).built_in(reference=False) == ("perplexity",)


def test_the_float_model_is_scored_where_it_was_named() -> None:
    assert Evaluation(reference="m").scores_float
    assert not Evaluation(reference="m", eval_float=False).scores_float
    assert not Evaluation().scores_float
    assert Evaluation(eval_float=True).scores_float


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eval_bs", 0, "eval_bs: found 0; needed at least 1"),
        ("eval_seqlen", 1, "eval_seqlen: found 1; needed at least 2"),
        ("num_fewshot", -1, "num_fewshot: found -1; needed at least 0"),
        ("limit", 0.0, "limit: found 0.0; needed a positive number"),
        ("limit", float("nan"), "limit: found nan"),
        ("eval_backend", "sglang", "eval_backend: found 'sglang'; needed one of hf, vllm"),
        ("eval_dataset", "python-docs:splt=test", "splt"),
        ("eval_model_dtype", "int8", "eval_model_dtype: found 'int8'"),
    ],
)
def test_impossible_values(name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        Evaluation(**{name: value})
