"""What a resume costs, from events and their times."""

from typing import Any

from benchmarks.resume import Told, report


def events(opened: float, blocks: dict[int, tuple[float, float]]) -> list[tuple[float, dict[str, Any]]]:
    """Those of a run: when it had opened the model, when each block began and when its first step was done."""
    told: list[tuple[float, dict[str, Any]]] = [(opened, {"phase": "calibration", "block": 0, "step": 0})]
    for block, (begun, first) in blocks.items():
        told.append((begun, {"phase": "tuning", "block": block + 1, "step": 0}))
        told.append((first, {"phase": "tuning", "block": block + 1, "step": 1}))
    return told


def test_a_resume_costs_what_both_runs_take_longer_than_one_without_the_part_that_was_lost() -> None:
    whole = Told(events(4, {0: (10, 30), 1: (40, 42), 2: (60, 62)}), 85.0)
    first = Told(events(4, {0: (10, 30), 1: (40, 42)}), 50.0)  # 10 s of block 1 are lost
    second = Told(events(5, {1: (12, 14), 2: (32, 34)}), 57.0)
    lines = report(whole, first, second, 0.85, 1, 3)
    assert "0.85 s, 1.00%, are the journal's" in lines[0]
    assert "killed after 50.0 s, 10.0 s into block 1; went on for 57.0 s" in lines[1]
    assert "14.0 s, 9.0 s of it after the model was opened; 2.0 s are" in lines[2]
    # 50 - 10 + 57 - 85 by the sum; 14 s to the step that takes 2 s by itself
    assert "costs 12.0 s by the sum" in lines[3] and "14.1% of the run" in lines[3] and "12.0 s, 14.1%" in lines[3]
    assert f"{100 * 12 / (85 + 27 * 20):.1f}% or" in lines[4]
