"""Runs over several devices. The processor stands for each of them: what differs is who computes which rows."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autoround import engine
from autoround.backends.cpu import CPU
from autoround.engine import quantize
from tests.engine.small import codes, equal_share, make, recipe, stopped, tune

Devices = Callable[[int], None]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    """Says how many devices there are."""

    def count(number: int) -> None:
        monkeypatch.setattr(engine, "select_all", lambda name: (CPU, (torch.device("cpu"),) * number))

    return count


@pytest.mark.parametrize("count", [2, 4])
def test_each_device_computes_a_micro_batch(count: int, devices: Devices, tmp_path: Path) -> None:
    """Where they are computed makes no difference, not in one bit."""
    one = tune(make(), tmp_path / "one", dtype="float32", batch_size=4 // count, gradient_accumulate_steps=count)
    devices(count)
    several = tune(make(), tmp_path / "several", dtype="float32", batch_size=4)
    assert equal_share(codes(one), codes(several)) == 1


def test_rows_that_cannot_be_shared_evenly(devices: Devices, tmp_path: Path) -> None:
    """The result is that of one device but for the order of sums."""
    one = tune(make(), tmp_path / "one", dtype="float32", batch_size=4)
    devices(3)
    several = tune(make(), tmp_path / "several", dtype="float32", batch_size=4)
    assert equal_share(codes(one), codes(several)) > 0.97


def test_a_run_goes_on_over_another_number_of_devices(devices: Devices, tmp_path: Path) -> None:
    """The rows of a step stay divided as they were, so that the bytes are the same."""
    devices(4)
    whole, made = tune(make(), tmp_path / "whole", batch_size=4), recipe(tmp_path / "parts", batch_size=4)
    stopped(make(), made, after=1)
    devices(2)
    run = quantize(make(), made)
    assert [done.resumed for done in run] == [True, False]
    assert equal_share(codes(run), codes(whole)) == 1


def test_fewer_rows_than_devices(devices: Devices, tmp_path: Path) -> None:
    devices(8)
    several = tune(make(), tmp_path / "several", dtype="float32", batch_size=2)
    devices(2)
    assert equal_share(codes(several), codes(tune(make(), tmp_path / "two", dtype="float32", batch_size=2))) == 1
