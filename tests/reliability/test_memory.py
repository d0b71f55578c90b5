"""What rows on the disk leave in memory."""

import sys
from pathlib import Path

import pytest

from tests.reliability.conftest import Driver, left

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

NSAMPLES, SEQLEN, HIDDEN = 4096, 64, 64


def test_rows_on_the_disk_are_no_memory_of_the_process(driver: Driver, tmp_path: Path) -> None:
    """Two copies of the rows, of two or four bytes a number, are files; one of them is more than peaks vary by."""
    vocabulary = 90
    rows = [
        [3 + (7 * row + 5 * token + row * token) % vocabulary for token in range(SEQLEN)] for row in range(NSAMPLES)
    ]
    settings = {"iters": 1, "dataset": rows, "nsamples": NSAMPLES, "seqlen": SEQLEN, "batch_size": 64}
    peaks = {}
    for place in ("ram", "disk"):
        told = driver.run(tmp_path / place / "out", settings=settings | {"activations": place}, watched=True)
        assert told["status"] == 0, told
        peaks[place] = told["anonymous"]
    print(f"most anonymous memory: {peaks['ram'] / 1e6:.0f} MB in memory, {peaks['disk'] / 1e6:.0f} MB on the disk")
    assert peaks["ram"] - peaks["disk"] > NSAMPLES * SEQLEN * HIDDEN * 2
    assert left(tmp_path / "ram") == left(tmp_path / "disk")
