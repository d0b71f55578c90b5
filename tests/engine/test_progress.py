"""What a run tells while it works."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoround.progress import REPORT_SECONDS, EvaluationMeter, Meter, Progress


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


class Clock:
    """Takes the place of the module ``time``; goes on when it is told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_blocks_abreast_of_others_take_no_time_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nine blocks, three at a time, each turn takes ten seconds."""
    clock, events = Clock(), list[Progress]()
    monkeypatch.setattr("autoround.progress.time", clock)
    own = Meter(9, 10, lambda: 123, events.append, abreast=3)
    for turn in (0, 3, 6):
        own.begin(turn, "layers")
        if turn:
            assert events[-1].eta_seconds == pytest.approx(10 * (3 - turn // 3))
        clock.now += 10
        for index in range(turn, turn + 3):
            assert own.end(index, "layers", {}).seconds == 10


# What a block takes beside the others: they differ by a tenth.
BLOCKS = st.lists(st.floats(0.95, 1.05), min_size=4, max_size=30)
# Seconds before the first step, of ten steps, and after the last one.
SECONDS = st.tuples(st.floats(0, 20), st.floats(5, 20), st.floats(0, 5))


def foretold(
    blocks: list[float], seconds: tuple[float, float, float], waits: dict[int, float], *, resumed: int = 0
) -> dict[tuple[int, int], tuple[float | None, float]]:
    """What is foretold and what is true, by block and step, where some blocks wait for a compiler."""
    clock, steps = Clock(), 10
    events: list[tuple[Progress, float]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autoround.progress.time", clock)
        own = Meter(len(blocks), steps, lambda: 0, lambda event: events.append((event, clock.now)))
        for index in range(resumed):
            own.resumed(index, "", {})
        for index, factor in enumerate(blocks[resumed:], resumed):
            before, steady, after = (factor * each for each in seconds)
            own.begin(index, "")
            clock.now += before + waits.get(index, 0.0)
            for step in range(1, steps + 1):
                clock.now += steady / steps
                own.step(step, 64, lambda: 1.0)
            clock.now += after
            own.end(index, "", {})
    return {(event.block, event.step): (event.eta_seconds, clock.now - now) for event, now in events}


@given(BLOCKS, SECONDS, st.integers(0, 1), st.floats(0, 200))
def test_from_the_third_block_on_what_is_left_is_known_within_a_fifth(
    blocks: list[float], seconds: tuple[float, float, float], resumed: int, slow: float
) -> None:
    """However long the first one waited for the compiler; blocks that were found finished took no time now."""
    found = foretold(blocks, seconds, {resumed: slow}, resumed=resumed)
    assert found[resumed + 1, 0][0] is None
    assert found[resumed + 1, 1][0] is None  # no pace is known yet
    late = [pair for (block, _), pair in found.items() if block >= resumed + 3]
    assert len(late) == 11 * (len(blocks) - resumed - 2)
    assert all(eta == pytest.approx(true, rel=0.2) for eta, true in late)


def test_one_block_that_waits_for_the_compiler_again_changes_nothing() -> None:
    found = foretold([1.0] * 20, (2, 10, 1), {0: 40, 4: 30})
    assert all(eta == pytest.approx(true, rel=0.01) for (block, _), (eta, true) in found.items() if block > 5)


def test_the_second_block_and_blocks_without_steps() -> None:
    found = foretold([1.0] * 6, (2, 10, 1), {0: 40})
    assert found[1, 6][0] == pytest.approx(6 * 10 - 6 + 1)  # nothing else is known than the pace
    assert all(found[2, step][0] == pytest.approx(found[2, step][1], rel=0.01) for step in range(1, 11))
    events: list[Progress] = []
    own = meter(events, steps=0)
    for index in range(4):
        own.begin(index, "")
        own.end(index, "", {})
    assert [event.eta_seconds is None for event in events] == [True, False, False, False]


def test_a_step_tells_its_loss_its_pace_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, events = Clock(), []
    monkeypatch.setattr("autoround.progress.time", clock)
    own: Meter = meter(events)
    done = own.resumed(0, "layers.0", {"loss_first": 3.0})
    assert (done.index, done.resumed, done.loss_first, done.loss_last) == (0, True, 3.0, 0.0)
    own.begin(1, "layers.1")
    for step in (1, 2):
        clock.now += 0.5
        own.step(step, 64, lambda step=step: 1.0 / step)  # type: ignore[misc]
    first, second = events[1:]
    assert (first.block, first.step, first.loss, first.tokens_per_second) == (2, 1, 1.0, None)
    assert (second.step, second.loss_first, second.loss, second.memory_bytes) == (2, 1.0, 0.5, 123)
    assert (second.tokens_per_second, second.seconds) == (128, 1.0)


@given(
    st.lists(st.floats(0.95, 1.05), min_size=8, max_size=40),
    st.floats(0, 10),
    st.floats(0.5, 30),
    st.sampled_from([1, 2]),
)
def test_from_the_third_block_of_an_evaluation_on_what_is_left_is_known_within_a_fifth(
    blocks: list[float], wait: float, logits: float, candidates: int
) -> None:
    """If the guess of what the logits take is right; from the first tokens on it is not needed."""
    clock, events, count = Clock(), list[tuple[Progress, float]](), len(blocks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autoround.progress.time", clock)
        own = EvaluationMeter(
            (1 + candidates) * count, logits, lambda: 5, lambda event: events.append((event, clock.now))
        )
        for model in range(1 + candidates):
            for index, factor in enumerate(blocks):
                own.block(str(model), index + 1, count)
                clock.now += factor + (0 if model or index else wait)
            for done in range(0, 101, 10) if model else ():
                clock.now += logits / candidates / 10 if done else 0
                own.logits(str(model), done, 100, (model - 1 + done / 100) / candidates)
    assert events[0][0].eta_seconds is None
    for event, now in events[3:]:
        assert event.eta_seconds == pytest.approx(clock.now - now, rel=0.2, abs=1e-6)
    told = [event for event, _ in events if event.message == "1, logits"]
    assert [(event.step, event.steps) for event in (told[0], told[-1])] == [(0, 100), (100, 100)]
    assert told[0].memory_bytes == 5
