"""Runs that are killed, or otherwise end early, and go on."""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from autoround.config import read
from autoround.engine import Run, quantize
from autoround.errors import FormatError, JournalError
from autoround.journal import open_journal, read_manifest
from autoround.progress import Progress
from autoround.recipe import Recipe
from tests.children import events, start
from tests.engine.small import VOCABULARY, codes, hashes, make, recipe, rows, stopped, tune

CHILD = Path(__file__).with_name("interrupted.py")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make("llama_3")


@pytest.fixture(scope="module")
def whole(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was not interrupted, of the model in a folder, exported."""
    folder = tmp_path_factory.mktemp("whole")
    model.save_pretrained(folder / "source")
    run = tune(folder / "source", folder)
    run.export()
    return run


def output(run: Run) -> dict[str, str]:
    return hashes(Path(run.recipe.output_dir))


def went_on(model: PreTrainedModel | Path, made: Recipe) -> tuple[Run, list[bool]]:
    """The run taken up and exported, and which blocks were found finished."""
    run = quantize(model, made)
    resumed = [done.resumed for done in run]
    run.export()
    return run, resumed


# Killed


def kill(folder: Path, *, at: str) -> list[str]:
    """Start a run in a process of its own and kill it when it tells this event; all it told."""
    told: list[str] = []
    with start(CHILD, folder, threads=torch.get_num_threads()) as child:
        for event in events(child):
            told.append(event)
            if event == at:
                child.send_signal(signal.SIGKILL)
                break
    assert child.returncode == -signal.SIGKILL, told
    return told


@pytest.mark.slow
def test_killed_inside_a_block_and_between_blocks(whole: Run, model: PreTrainedModel, tmp_path: Path) -> None:
    """Three processes for one run, the last of them this one; every exported byte is that of an uninterrupted run."""
    model.save_pretrained(tmp_path / "source")
    made = recipe(tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(made)))
    told = kill(tmp_path, at="block 1 step 3")
    assert told[-4:] == ["block 0 done", "block 1 step 1", "block 1 step 2", "block 1 step 3"]
    assert "block 0 step 1" in told
    told = kill(tmp_path, at="block 1 done")
    assert [event for event in told if "step" not in event] == ["block 0 resumed", "block 1 done"]
    assert not (tmp_path / "out").exists()
    run, resumed = went_on(tmp_path / "source", made)
    assert resumed == [True, True, False]
    assert output(run) == output(whole)
    blocks = hashes(run.journal_folder / "blocks")
    assert blocks == hashes(whole.journal_folder / "blocks")
    assert sorted(blocks) == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]


# Given up


@pytest.mark.parametrize("after", [1, 2, 3])
def test_given_up_between_blocks(after: int, whole: Run, model: PreTrainedModel, tmp_path: Path) -> None:
    done = stopped(model, recipe(tmp_path), after=after)
    assert not any(each.resumed for each in done)
    run = quantize(model, recipe(tmp_path))
    events = list(run)
    assert [replace(each, seconds=0.0) for each in events[:after]] == [
        replace(each, seconds=0.0, resumed=True) for each in done
    ]
    assert [each.resumed for each in events] == [index < after for index in range(3)]
    run.export()
    assert output(run) == output(whole)


@pytest.mark.parametrize(
    "settings", [{"momentum": 0.9, "keep": "best"}, {"adam": True}, {"iters": 0, "clip_search": True}]
)
def test_given_up_with_other_settings(settings: dict[str, Any], model: PreTrainedModel, tmp_path: Path) -> None:
    stopped(model, recipe(tmp_path / "parts", **settings), after=2)
    parts, _ = went_on(model, recipe(tmp_path / "parts", **settings))
    whole, _ = went_on(model, recipe(tmp_path / "whole", **settings))
    assert output(parts) == output(whole)


def test_nearest_without_data_goes_on_too(model: PreTrainedModel, tmp_path: Path) -> None:
    stopped(model, recipe(tmp_path, "rtn", dataset=None), after=2)
    _, resumed = went_on(model, recipe(tmp_path, "rtn", dataset=None))
    assert resumed == [True, True, False]


def test_stopped_between_activations_and_codes(whole: Run, model: PreTrainedModel, tmp_path: Path) -> None:
    """The activations of a block are there and its codes are not, or only half of them: the block is done again."""
    stopped(model, recipe(tmp_path), after=2)
    blocks = tmp_path / "out.journal" / "blocks"
    (blocks / "00001.safetensors").rename(blocks / "00001.safetensors.partial")
    run, resumed = went_on(model, recipe(tmp_path))
    assert resumed == [True, False, False]
    assert output(run) == output(whole)
    assert hashes(run.journal_folder / "blocks") == hashes(whole.journal_folder / "blocks")  # and no partial file


def test_stopped_before_anything_was_journaled(model: PreTrainedModel, tmp_path: Path) -> None:
    journal = tmp_path / "out.journal"
    journal.mkdir()
    (journal / "manifest.json.partial").write_text('{"cal')
    _, resumed = went_on(model, recipe(tmp_path, "rtn"))
    assert resumed == [False] * 3
    assert sorted(path.name for path in journal.iterdir()) == ["blocks", "lock", "manifest.json", "run.yaml"]


# Finished


def test_a_finished_run_is_exported_again_without_tuning(whole: Run, model: PreTrainedModel, tmp_path: Path) -> None:
    for name in ("out", "out.journal"):
        shutil.copytree(Path(whole.recipe.output_dir).with_name(name), tmp_path / name)
    (tmp_path / "out" / "model.safetensors").write_bytes(b"damaged")
    events: list[Progress] = []
    run = quantize(model, recipe(tmp_path), on_progress=events.append)
    assert not (run.journal_folder / "activations").exists()
    assert [done.resumed for done in run] == [True] * 3
    run.export()
    assert {event.phase for event in events} == {"calibration", "export"}
    assert output(run) == output(whole)


def test_settings_that_decide_no_code_may_change(model: PreTrainedModel, tmp_path: Path) -> None:
    stopped(model, recipe(tmp_path), after=1)
    run, resumed = went_on(model, recipe(tmp_path, format=("auto_round", "fake"), max_shard_size="50KB"))
    assert resumed == [True, False, False]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["auto_round", "fake"]


# Other runs


def other_weights() -> PreTrainedModel:
    model = make("llama_3")
    with torch.no_grad():
        model.model.norm.weight[5] += 0.125
    return model


CHANGES: dict[str, tuple[Callable[[], PreTrainedModel] | None, dict[str, Any], str]] = {
    "iters": (None, {"iters": 7}, r"recipe\.iters: was 6, now 7"),
    "seed": (None, {"seed": 43}, r"recipe\.seed: was 42, now 43"),
    "bits": (None, {"bits": 3}, r"recipe\.bits: was 2, now 3; .*; plan\..*bits: was 2, now 3.* and \d+ more"),
    "sym": (None, {"sym": False}, r"recipe\.sym: was None, now False"),
    "weights": (other_weights, {}, r"source_sha256: was '\w{64}', now '\w{64}'"),
    "blocks": (lambda: make("llama"), {}, "source_sha256"),
    "data": (None, {"dataset": rows(seed=2)}, r"calibration_sha256: was '\w{64}', now '\w{64}'"),
    "one token": (None, {"dataset": [[VOCABULARY - 1, *rows()[0][1:]], *rows()[1:]]}, "calibration_sha256"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_refused_by_what_differs(change: str, model: PreTrainedModel, tmp_path: Path) -> None:
    changed, settings, difference = CHANGES[change]
    stopped(model, recipe(tmp_path), after=1)
    before = hashes(tmp_path)
    run = quantize(changed() if changed else model, recipe(tmp_path, **settings))
    with pytest.raises(JournalError, match=rf"out\.journal: found the journal of another run.*{difference}.*--restart"):
        next(iter(run))
    assert hashes(tmp_path) == before


def test_a_format_that_holds_the_same_codes_may_be_added(model: PreTrainedModel, tmp_path: Path) -> None:
    stopped(model, recipe(tmp_path, bits=4), after=1)
    run = quantize(model, recipe(tmp_path, bits=4, format=("auto_round", "auto_gptq")))
    assert [done.resumed for done in run] == [True, *[False] * (len(run.plan.parts) - 1)]
    assert [folder.name for folder in run.export()] == ["auto_round", "auto_gptq"]


def test_zero_points_that_a_format_lacks_make_another_run(model: PreTrainedModel, tmp_path: Path) -> None:
    stopped(model, recipe(tmp_path, bits=4, sym=False), after=1)
    run = quantize(model, recipe(tmp_path, bits=4, sym=False, format=("auto_gptq",)))
    with pytest.raises(JournalError, match=r"plan\.model\.layers\.0\.\S+\.zero_min: was 0, now 1"):
        next(iter(run))


def test_the_message_is_short_however_much_differs(model: PreTrainedModel, tmp_path: Path) -> None:
    stopped(model, recipe(tmp_path, "rtn"), after=1)
    with pytest.raises(JournalError) as caught:
        next(iter(quantize(model, recipe(tmp_path, "rtn", bits=8, group_size=16, sym=False))))
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 500


def test_overwrite_starts_anew(whole: Run, model: PreTrainedModel, tmp_path: Path) -> None:
    went_on(model, recipe(tmp_path, iters=3))
    (tmp_path / "out" / "mine.txt").write_text("")
    run, resumed = went_on(model, recipe(tmp_path, overwrite=True))
    assert resumed == [False] * 3
    assert output(run) == output(whole)
    assert not read(run.journal_folder / "run.yaml")["overwrite"]  # with which a run that was stopped goes on


def test_restart_discards_the_journal_alone(whole: Run, model: PreTrainedModel, tmp_path: Path) -> None:
    """The folder of the earlier run is replaced when the new one is written; one without a journal is not touched."""
    went_on(model, recipe(tmp_path, iters=3))
    before = hashes(tmp_path / "out")
    run = quantize(model, recipe(tmp_path, restart=True))
    assert [done.resumed for done in run] == [False] * 3
    assert hashes(tmp_path / "out") == before
    run.export()
    assert output(run) == output(whole)
    assert not read(run.journal_folder / "run.yaml")["restart"]  # which goes on where it was stopped
    shutil.rmtree(run.journal_folder)
    with pytest.raises(FormatError, match="out: found other files; needed an empty folder; .*--overwrite"):
        quantize(model, recipe(tmp_path, restart=True))


def test_overwrite_does_not_take_what_is_no_journal(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "out.journal").mkdir()
    (tmp_path / "out.journal" / "diary.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(JournalError, match=r"out\.journal: found files that are not a journal"):
            list(quantize(model, recipe(tmp_path, "rtn", overwrite=overwrite)))
    assert [path.name for path in (tmp_path / "out.journal").iterdir()] == ["diary.txt"]


# Damaged journals


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "block": ("blocks/00001.safetensors", truncate),
    "block header": ("blocks/00000.safetensors", lambda file: file.write_bytes(b"half")),
    "activations": ("activations/1.quantized_NTD", truncate),
    "what activations are": ("activations/1.json", truncate),
    "no activations": ("activations/1.float_NTD", Path.unlink),
    "manifest": ("manifest.json", truncate),
    "empty manifest": ("manifest.json", lambda file: file.write_text("{}")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_journal_is_named(damage: str, model: PreTrainedModel, tmp_path: Path) -> None:
    stopped(model, recipe(tmp_path), after=2)
    name, spoil = DAMAGES[damage]
    spoil(tmp_path / "out.journal" / name)
    with pytest.raises(JournalError, match=rf"{name}.*--restart"):
        quantize(model, recipe(tmp_path)).export()
    assert not (tmp_path / "out").exists()
    _, resumed = went_on(model, recipe(tmp_path, restart=True))
    assert resumed == [False] * 3


def test_a_damaged_block_does_not_reach_an_export(whole: Run, model: PreTrainedModel, tmp_path: Path) -> None:
    for name in ("out", "out.journal"):
        shutil.copytree(Path(whole.recipe.output_dir).with_name(name), tmp_path / name)
    run = quantize(model, recipe(tmp_path))
    list(run)
    truncate(run.journal_folder / "blocks" / "00002.safetensors")
    before = output(run)
    with pytest.raises(JournalError, match=r"00002\.safetensors"):
        run.export()
    assert output(run) == before


def test_activations_of_another_block_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    stopped(model, recipe(tmp_path), after=2)
    slots = tmp_path / "out.journal" / "activations"
    for name in ("json", "float_NTD", "quantized_NTD"):
        shutil.copy(slots / f"0.{name}", slots / f"1.{name}")
    with pytest.raises(JournalError, match=r"1\.json: found activations of block 0; needed 1; .*--restart"):
        list(quantize(model, recipe(tmp_path)))


def test_a_journal_keeps_codes_exactly(whole: Run) -> None:
    journal = open_journal(whole.journal_folder, read_manifest(whole.journal_folder))
    assert journal.finished() == 3
    for own in codes(whole).values():
        assert [tensor.dtype for tensor in own] == [torch.uint8, torch.float16, torch.uint8]
        assert int(own.q_OI.max()) <= 3
