"""Command lines of Intel's documentation: accepted with the same meaning, or refused by name."""

import pytest

from tests.cli.intel_table import PAGE, Line, differences, judge, lines, page, searched_there_alone

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


def test_the_page_is_current() -> None:
    """``make intel-table`` writes it."""
    assert PAGE.read_text() == page()
