"""What a run tells while it works."""

import time

import pytest

from autoround.progress import REPORT_SECONDS, Meter, Progress


def meter(events: list[Progress] | None, *, blocks: int = 4, steps: int = 10) -> Meter:
    return Meter(blocks, steps, lambda: 123, None if events is None else events.append)


def test_a_few_events_a_second_and_no_loss_is_read_for_nothing() -> None:
    """Reading a loss waits for the device."""
    events: list[Progress] = []
    read: list[int] = []
    own, start = meter(events, steps=2000), time.monotonic()
    own.begin(0, "layers.0")
    for step in range(1, 2001):
        own.step(step, 64, lambda step=step: read.append(step) or 0.5)  # type: ignore[misc]
    most = 2 + int((time.monotonic() - start) / REPORT_SECONDS)
    assert 2 <= len(events) <= most
    assert (events[0].step, events[0].message, events[1].step) == (0, "layers.0", 1)
    assert set(read) == {event.step for event in events[1:]}


def test_nobody_listens() -> None:
    own = meter(None)
    own.phase("calibration", "reading text")
    own.begin(0, "layers.0")
    own.step(1, 64, lambda: 2.0)
    done = own.end(0, "layers.0", {"loss_first": 2.0, "loss_best": 1.0, "loss_last": 1.5})
    assert (done.loss_first, done.loss_best, done.loss_last, done.resumed) == (2.0, 1.0, 1.5, False)


@pytest.mark.parametrize("finished", [0, 2])
def test_what_is_left_is_foretold_from_the_work_of_this_run(finished: int) -> None:
    """Blocks that were found finished took no time now, and so do not count."""
    events: list[Progress] = []
    own, begun = meter(events), 0.0
    time.sleep(REPORT_SECONDS)
    for index in range(finished):
        done = own.resumed(index, f"layers.{index}", {"loss_first": 3.0})
        assert (done.index, done.resumed, done.loss_first, done.loss_last) == (index, True, 3.0, 0.0)
    for index in range(finished, 4):
        own.begin(index, f"layers.{index}")
        begun = begun or time.monotonic()  # the first step may have waited for the compiler
        for step in (1, 2):
            own.step(step, 64, lambda step=step: 1.0 / step)  # type: ignore[misc]
            time.sleep(REPORT_SECONDS)
        first, second = events[-2:]
        assert (first.block, first.step, first.loss, first.tokens_per_second) == (index + 1, 1, 1.0, None)
        assert (second.step, second.loss_first, second.loss, second.memory_bytes) == (2, 1.0, 0.5, 123)
        assert second.tokens_per_second is not None
        assert 0 < second.tokens_per_second <= 64 / REPORT_SECONDS
        work = index - finished + 0.1
        pace = (time.monotonic() - REPORT_SECONDS - begun) / work
        assert second.eta_seconds == pytest.approx(pace * (4 - finished - work), rel=0.05)
