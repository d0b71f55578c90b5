"""A run that is killed, at whatever moment, and started again by the same command gives the same bytes."""

import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.reliability.conftest import BLOCKS, Driver, Whole, left

pytestmark = pytest.mark.slow


def ended(told: dict[str, object]) -> bool:
    """Whether a run came to its end, which it must unless it was killed."""
    assert "error" not in told, told
    assert told["status"] in (0, -signal.SIGKILL), told
    return told["status"] == 0


@pytest.mark.parametrize("activations", ["ram", "disk"])
def test_after_every_block(activations: str, driver: Driver, whole: Whole, tmp_path: Path) -> None:
    places = {"activations": activations}
    for number in range(BLOCKS):
        assert not ended(driver.run(tmp_path / "out", settings=places, after_block=True)), number
    assert not (tmp_path / "out").exists()
    assert ended(driver.run(tmp_path / "out", settings=places, after_block=True))  # no block is left to do
    assert left(tmp_path) == whole.files


def test_at_changes_of_files_and_inside_of_writes(driver: Driver, whole: Whole, tmp_path: Path) -> None:
    """Every attempt dies some points later than the one before it, so that all phases of a run are met."""
    kills = 0
    while not ended(driver.run(tmp_path / "out", at_point=1 + 6 * kills)):
        kills += 1
    assert kills >= 20
    assert left(tmp_path) == whole.files


@pytest.mark.parametrize(("seed", "activations"), [(1, "ram"), (2, "disk")])
def test_at_random_times(seed: int, activations: str, driver: Driver, whole: Whole, tmp_path: Path) -> None:
    times, kills, places = random.Random(seed), 0, {"activations": activations}
    while kills < 6:
        seconds = times.uniform(0.05, 1.0) * whole.seconds
        while not ended(driver.run(tmp_path / "out", settings=places, after_seconds=seconds)):
            kills, seconds = kills + 1, times.uniform(0.05, 1.0) * whole.seconds
        assert left(tmp_path) == whole.files
        for name in ("out", "out.journal"):
            shutil.rmtree(tmp_path / name)


@pytest.mark.parametrize("point", [3, 5, 8, 13])
def test_while_an_earlier_journal_is_discarded(point: int, driver: Driver, whole: Whole, tmp_path: Path) -> None:
    anew = {"restart": True}
    assert ended(driver.run(tmp_path / "out", settings={"iters": 1}))
    assert not ended(driver.run(tmp_path / "out", settings=anew, at_point=point))
    assert ended(driver.run(tmp_path / "out", settings=anew))
    assert left(tmp_path) == whole.files
