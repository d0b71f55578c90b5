"""Where the rows that flow from block to block lie: the same bytes wherever that is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autoround import engine
from autoround.engine import Run, quantize
from autoround.errors import JournalError
from autoround.progress import Progress
from autoround.slots import Slots
from autoround.tuner import BlockTuner, Tuned
from tests.engine.small import hashes, make, recipe, stopped


def exported(folder: Path, **settings: Any) -> tuple[Run, dict[str, str], list[str]]:
    """A run with the hashes of what it wrote, and what it told."""
    told: list[Progress] = []
    run = quantize(make("llama_3"), recipe(folder, **settings), on_progress=told.append)
    run.export()
    return run, hashes(folder / "out"), [event.message for event in told]


@pytest.mark.parametrize(
    "settings", [{}, {"iters": 0, "clip_search": True}, {"format": ("fake",), "quant_lm_head": True}]
)
def test_on_the_disk(settings: dict[str, Any], tmp_path: Path) -> None:
    run, on_disk, told = exported(tmp_path / "disk", activations="disk", **settings)
    assert any(text.endswith("activations lie in files of the journal") for text in told)
    _, in_memory, told = exported(tmp_path / "ram", activations="ram", **settings)
    assert any(text.endswith("activations lie in memory (cpu)") for text in told)
    assert on_disk == in_memory
    assert not (run.journal_folder / "activations").exists()


def test_rows_on_the_disk_are_those_of_the_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the tuner is given and gives back lies in the files of the journal: they are written once."""
    seen: list[dict[str, int]] = []
    write = Slots.write

    def watched(slots: Slots, index: int, tensors: dict[str, torch.Tensor]) -> None:
        before = {name: tensor.data_ptr() for (_, name), tensor in slots._made.items() if name != "hidden_NTD"}
        assert before == {name: tensor.data_ptr() for name, tensor in tensors.items()}
        seen.append(before)
        write(slots, index, tensors)

    monkeypatch.setattr(Slots, "write", watched)
    exported(tmp_path, activations="disk")
    assert len(seen) == 2


@pytest.mark.parametrize("settings", [{}, {"iters": 0, "clip_search": True}])
def test_rows_in_memory_take_the_place_of_those_that_flowed_in(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tune, places = BlockTuner.tune, []

    def watched(tuner: BlockTuner, *args: Any) -> Tuned:
        tuned = tune(tuner, *args)
        places.append([rows.data_ptr() for rows in tuned.stream or ()])
        return tuned

    monkeypatch.setattr(BlockTuner, "tune", watched)
    exported(tmp_path, activations="ram", **settings)
    assert places[0] == places[1] == places[2]
    assert len(set(places[0])) == 2  # without steps, those of float blocks lie nowhere


@pytest.mark.parametrize(("first", "then"), [("ram", "disk"), ("disk", "ram"), ("disk", "disk")])
@pytest.mark.parametrize("after", [1, 2])
def test_a_run_goes_on_with_them_elsewhere(first: str, then: str, after: int, tmp_path: Path) -> None:
    stopped(make("llama_3"), recipe(tmp_path / "parts", activations=first), after=after)
    _, parts, _ = exported(tmp_path / "parts", activations=then)
    _, whole, _ = exported(tmp_path / "whole")
    assert parts == whole


def test_auto_goes_by_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = 2 * 16 * 16 * 64  # copies, rows, tokens, hidden size
    for share, expected in ((1.9, True), (2.1, False)):
        monkeypatch.setattr(engine, "free_bytes", lambda: {"here": 10**9, "there": 0})
        size = quantize(make(), recipe(tmp_path)).numerics.torch_dtype.itemsize
        bound = int(share * rows * size)
        monkeypatch.setattr(engine, "free_bytes", lambda bound=bound: {"this machine": 10**12, "a limit": bound})
        assert quantize(make(), recipe(tmp_path)).place.on_disk is expected
        assert quantize(make(), recipe(tmp_path, activations="disk")).place.on_disk
        assert not quantize(make(), recipe(tmp_path, activations="ram")).place.on_disk
        assert not quantize(make(), recipe(tmp_path, "rtn")).place.on_disk  # has none


def test_older_rows_make_room_for_newer_ones(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "activations")
    for index in range(4):
        made = slots.make(index, "float_NTD", (2, 3), torch.bfloat16)
        made.fill_(index)
        slots.write(index, {"float_NTD": made, "quantized_NTD": torch.full((1, 2), float(index))})
        found = slots.read(index)
        assert {name: (own.dtype, tuple(own.shape), set(own.flatten().tolist())) for name, own in found.items()} == {
            "float_NTD": (torch.bfloat16, (2, 3), {index}),
            "quantized_NTD": (torch.float32, (1, 2), {index}),
        }
    assert sorted(path.name for path in (tmp_path / "activations").iterdir()) == [
        f"{slot}.{name}" for slot in (0, 1) for name in ("float_NTD", "json", "quantized_NTD")
    ]
    slots.make(4, "float_NTD", (2, 3), torch.bfloat16)
    with pytest.raises(JournalError, match=r"0\.json: .*No such file.*--restart"):
        slots.read(4)
    assert set(slots.read(3)) == {"float_NTD", "quantized_NTD"}


def test_the_place_is_no_part_of_what_a_run_is(tmp_path: Path) -> None:
    made = recipe(tmp_path, activations="disk")
    stopped(make(), made, after=1)
    assert [done.resumed for done in quantize(make(), replace(made, activations="auto"))] == [True, False]
