"""Memory of runs of few and of many blocks."""

import sys
from pathlib import Path

import pytest
import torch

from tests.children import start
from tests.engine.small import make
from tests.reliability.conftest import DRIVER, Driver

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

FEW, MANY, HIDDEN = 6, 24, 512
# Those of a block: four projections of attention, two of them half as wide, and three twice as wide.
WEIGHTS = (3 + 6) * HIDDEN**2


def test_blocks_that_are_done_leave_nothing_in_memory(tmp_path: Path) -> None:
    """A byte for each weight of the blocks that are more, as codes have, would be several times what is allowed."""
    driver = Driver(tmp_path, start(DRIVER, tmp_path))
    settings = {"iters": 1, "format": ["auto_round"], "max_shard_size": "5GB"}
    peaks = {}
    with driver.process as process:
        for blocks in (FEW, MANY):
            model = make(hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=blocks)
            model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
            told = driver.run(tmp_path / str(blocks) / "out", settings=settings, watched=True)
            assert told["status"] == 0, told
            peaks[blocks] = told["anonymous"]
        assert process.stdin is not None
        process.stdin.close()
    print(f"most anonymous memory: {peaks[FEW] / 1e6:.0f} MB of {FEW} blocks, {peaks[MANY] / 1e6:.0f} MB of {MANY}")
    assert peaks[MANY] - peaks[FEW] < (MANY - FEW) * WEIGHTS / 4
