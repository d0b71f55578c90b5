"""Tables fit a terminal."""

from hypothesis import given
from hypothesis import strategies as st

from autoround.evaluate.results import Measure, ModelResults, Results, WorstToken
from autoround.tables import aligned, cells, fold, tail

TEXT = st.text("ab c日é\u0301_", max_size=60)
WORST = WorstToken(
    kl=12.3456, row=12, place=345, context="text \n before" * 9, token=" encyclopedias", float_choice=" internationale",
    choice="日本語のテキスト", float_nll=1.0, nll=2.0)  # fmt: skip


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=5), st.integers(30, 100))
def test_no_line_is_wider_and_no_letter_is_lost(rows: list[tuple[str, str, str]], width: int) -> None:
    lines = aligned(rows, width)
    assert max(map(cells, lines)) <= width
    spaceless = sorted("".join("".join(row) for row in rows).replace(" ", ""))
    assert sorted("".join(lines).replace(" ", "")) == spaceless


@given(TEXT, st.integers(2, 40))
def test_a_fold_and_a_tail_fit(text: str, width: int) -> None:
    assert all(cells(line) <= width for line in fold(text, width))
    assert cells(tail(text, width)) <= width
    assert tail(text, width) == text or text.endswith(tail(text, width)[1:])


def results(models: int) -> Results:
    tasks, metrics = ("python_docs_perplexity", "kl"), ("nats per token", "same top token")
    measures = [Measure(task=task, metric=each, value=1234.5678, error=123.4567) for task in tasks for each in metrics]
    own = [ModelResults(name=f"model-{index}", measures=tuple(measures), worst=(WORST,) * 3) for index in range(models)]
    return Results(models=tuple(own), text="some text")


def test_models_that_do_not_fit_beside_each_other_come_below() -> None:
    lines = results(5).table(80).splitlines()
    assert max(map(cells, lines)) <= 80
    heads = [line.split()[2:] for line in lines if line.startswith("task ")]
    assert heads == [["model-0"], ["model-1"], ["model-2"], ["model-3"], ["model-4"]]
    wide = results(5).table(200).splitlines()
    assert max(map(cells, wide)) <= 200
    assert wide[0].split() == ["task", "metric", *(f"model-{index}" for index in range(5))]
    assert results(5).table().splitlines()[0] == wide[0]


def test_the_end_of_the_text_before_the_worst_tokens_is_what_fits() -> None:
    for width in (60, 80, 120):
        lines = results(1).table(width).splitlines()
        assert max(map(cells, lines)) <= width
    start = lines.index("worst tokens of model-0")
    assert lines[start + 1].split() == ["kl", "row:place", "text", "came", "float", "here"]
    assert lines[start + 2].startswith("12.346  12:345     …")
    assert "before'  ' encyclopedias'  ' internationale'  '日本語のテキスト'" in lines[start + 2]
    assert repr(WORST.context) in results(1).table()
