"""Command lines of Intel's documentation: accepted with the same meaning, or refused by name."""

import pytest

from autoround.cli.main import main
from autoround.recipe import Recipe
from tests.cli.intel_table import PAGE, Line, differences, judge, lines, page, searched_there_alone
from tests.cli.stub import StubEngine

LINES = lines()


def test_there_are_enough_of_them() -> None:
    assert len({line.command for line in LINES}) == len(LINES) >= 60
    assert sum(not judge(line).refused for line in LINES) >= 40


@pytest.mark.parametrize("line", LINES, ids=[line.command for line in LINES])
def test_a_line_means_the_same_or_is_refused_by_name(line: Line) -> None:
    verdict = judge(line)
    if verdict.refused:
        assert "unknown flag" not in verdict.refused or "error" in line.theirs
    elif "iters" in line.theirs:
        assert verdict.recipe is not None
        assert differences(verdict.recipe, line.theirs) == []
        assert not searched_there_alone(verdict.recipe, line.theirs) or "--iters 0" in line.command


def test_what_means_nothing_here_is_told_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    engine = StubEngine()
    assert main(["m", "--low_cpu_mem_usage", "--not_use_best_mse", "--quiet"], quantize=engine) == 0
    assert engine.asked == [Recipe(model="m")]
    note = "--low_cpu_mem_usage: blocks are read one at a time, with or without it"
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("--")] == [note]


def test_the_page_is_current() -> None:
    """``make intel-table`` writes it."""
    assert PAGE.read_text() == page()
