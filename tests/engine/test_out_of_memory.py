"""Blocks for which memory runs out are begun again with less at a time; the journal says so, and a run that goes on
computes as the one did that it continues."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from autoround import engine, func
from autoround.backends.cpu import CpuBackend
from autoround.engine import Run, quantize
from autoround.errors import ModelError
from autoround.journal import read_manifest
from autoround.numerics import ran_out
from autoround.tuner import BlockTuner
from tests.engine.small import codes, equal_share, hashes, make, pin, recipe

Tight = Callable[..., None]
APART = {"batch_size": 1, "parallel": "blocks"}


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> Tight:
    """Makes a device that has room for so many rows in a step; ``blocks`` says of which blocks that holds."""
    tune, take_steps, current = BlockTuner.tune, func.tune_block, [0]

    def limit(rows: int, blocks: tuple[int, ...] = (0, 1, 2), *, error: Exception | None = None) -> None:
        def watched(tuner: BlockTuner, index: int, *args: Any) -> Any:
            current[0] = index
            return tune(tuner, index, *args)

        def checked(batches: Any) -> Iterator[Any]:
            for number, batch in enumerate(batches):
                parts = batch if isinstance(batch, list) else [batch]
                if number == 2 and current[0] in blocks and max(len(part.valid_BT) for part in parts) > rows:
                    raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
                yield batch

        def steps(step: Any, weights: Any, state: Any, batches: Any, **options: Any) -> Any:
            return take_steps(step, weights, state, checked(batches), **options)

        monkeypatch.setattr(BlockTuner, "tune", watched)
        monkeypatch.setattr(func, "tune_block", steps)

    return limit


def parts(run: Run) -> int:
    """Into how many parts the journal says that a step is divided."""
    return int(read_manifest(run.journal_folder)["numerics"]["micro_batches"])


@pytest.mark.parametrize(("rows", "expected"), [(2, 2), (1, 4)])
def test_a_block_begins_again_with_steps_in_more_parts(
    rows: int, expected: int, tight: Tight, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From the first block on, the bytes are those of a run whose steps were divided so from its begin."""
    begun = recipe(tmp_path / "begun")
    pin(make("llama_3"), begun, micro_batches=expected)
    whole = quantize(make("llama_3"), begun)
    whole.export()
    tight(rows)
    with caplog.at_level(logging.WARNING, logger="autoround"):
        run = quantize(make("llama_3"), recipe(tmp_path / "tight"))
        run.export()
    assert parts(run) == expected
    assert hashes(tmp_path / "tight" / "out") == hashes(tmp_path / "begun" / "out")
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == (
        "model.layers.0: memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB.); begins again with steps in "
        "2 parts, not 1"
    )
    assert len(told) == {2: 1, 1: 2}[rows]


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_goes_on_as_it_was_changed(after: int, tight: Tight, tmp_path: Path) -> None:
    """Stopped within the block that began again, or after it; there is room for everything when it goes on."""
    tight(2, (1,))
    whole = quantize(make("llama_3"), recipe(tmp_path / "whole"))
    whole.export()
    assert parts(whole) == 2
    stopped = iter(quantize(make("llama_3"), recipe(tmp_path / "parts")))
    next(stopped)
    if after == 1:
        tight(2, (1,))
        inner, calls = BlockTuner.tune, []

        def once(tuner: BlockTuner, *args: Any) -> Any:
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return inner(tuner, *args)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(BlockTuner, "tune", once)
            next(stopped)
    else:
        next(stopped)
    tight(100)
    run = quantize(make("llama_3"), recipe(tmp_path / "parts"))
    assert [done.resumed for done in run] == [number < after for number in range(3)]
    run.export()
    assert parts(run) == 2
    assert hashes(tmp_path / "parts" / "out") == hashes(tmp_path / "whole" / "out")


def test_steps_in_more_parts_sum_in_another_order_only(tight: Tight, tmp_path: Path) -> None:
    whole = quantize(make("llama_3"), pin(make("llama_3"), recipe(tmp_path / "whole"), dtype="float32"))
    list(whole)
    made = pin(make("llama_3"), recipe(tmp_path / "tight"), dtype="float32")
    tight(2)
    run = quantize(make("llama_3"), made)
    list(run)
    assert equal_share(codes(run), codes(whole)) > 0.97


def test_then_rows_go_to_the_disk_and_then_there_is_an_error(
    tight: Tight, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tight(0, (1,))
    run, message = quantize(make("llama_3"), recipe(tmp_path)), r"^model\.layers\.1: memory ran out \(CUDA .*; use a"
    with caplog.at_level(logging.WARNING, logger="autoround"), pytest.raises(ModelError, match=message):
        list(run)
    assert [record.getMessage().rpartition("; ")[2] for record in caplog.records] == [
        "begins again with steps in 2 parts, not 1",
        "begins again with steps in 4 parts, not 2",
        "begins again with activations in files of the journal, not in memory (cpu)",
    ]


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("settings", [{"iters": 0, "clip_search": True}, {"batch_size": 1}, APART])
def test_rows_on_the_disk_change_nothing(
    block: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where a step cannot be divided."""
    quantize(make("llama_3"), recipe(tmp_path / "whole", **settings)).export()
    tune, left = BlockTuner.tune, [1]

    def fails(tuner: BlockTuner, index: int, *args: Any) -> Any:
        found = tune(tuner, index, *args)
        if index == block and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(BlockTuner, "tune", fails)
    run = quantize(make("llama_3"), recipe(tmp_path / "disk", **settings))
    run.export()
    assert not left[0]
    assert parts(run) == 1
    assert hashes(tmp_path / "disk" / "out") == hashes(tmp_path / "whole" / "out")


def test_memory_is_released_first_and_other_errors_are_not_hidden(
    tight: Tight, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    released: list[int] = []
    monkeypatch.setattr(CpuBackend, "release_memory", lambda backend: released.append(1))
    tight(2, (0,), error=RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))
    next(iter(quantize(make(), recipe(tmp_path / "one"))))
    assert released == [1]
    tight(2, (0,), error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        next(iter(quantize(make(), recipe(tmp_path / "two"))))


def test_what_torch_says_when_the_host_has_no_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.float64)
    assert ran_out(caught.value)
    assert not ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not ran_out(ValueError("out of memory"))


def test_a_limit_too_small_for_one_block_is_told_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"this machine": 10**12, "the limit of this process": 10**5}
    monkeypatch.setattr(engine, "free_bytes", lambda: free)
    found = r"found 0\.1 MB that the limit of this process leaves free"
    with pytest.raises(ModelError, match=rf"^model.layers.0: {found}; needed at least [\d.]+ MB to tune its"):
        list(quantize(make(), recipe(tmp_path)))
    assert not list(tmp_path.iterdir())
    assert list(quantize(make(), recipe(tmp_path, "rtn")))  # takes a layer at a time
