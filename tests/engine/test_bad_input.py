"""What cannot work is said in one message, before any work where that is possible, and leaves nothing half-written."""

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoround.engine import quantize
from autoround.errors import AutoRoundError, DataError, FormatError, JournalError, ModelError, UsageError
from autoround.progress import Progress
from tests.engine.small import hashes, make, recipe, rows, tune

LAYER = "model.layers.1.self_attn.k_proj"


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make().save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_rows_are_no_longer_than_the_model_can_take(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = recipe(tmp_path, dataset=rows(length=100), seqlen=100)
    run = tune(make("gpt2"), tmp_path, dataset=made.dataset, seqlen=made.seqlen)
    assert run.recipe.seqlen == 64
    assert "seqlen: found 100; the model knows 64 positions; rows are as long as that" in caplog.text


# Weights


@pytest.mark.parametrize("preset", ["default", "rtn", "opt_rtn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(preset: str, value: float, tmp_path: Path) -> None:
    model = make()
    with torch.no_grad():
        model.get_submodule(LAYER).weight[3, 5] = value
    with pytest.raises(
        ModelError, match=rf"^{LAYER}: found 1 NaN or infinite values; needed finite weights; check the"
    ):
        quantize(model, recipe(tmp_path, preset)).export()
    assert left_behind(tmp_path) == ["out.journal"]  # the block before it is kept


def test_a_norm_that_is_not_finite_shows_in_the_loss(tmp_path: Path) -> None:
    model = make()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = float("nan")
    with pytest.raises(ModelError, match=r"^model.layers.1.loss: found nan at step 0; needed a finite one"):
        list(quantize(model, recipe(tmp_path)))


def test_weights_beyond_the_dtype_of_their_scales_are_named(tmp_path: Path) -> None:
    model = make()
    with torch.no_grad():
        model.get_submodule(LAYER).weight[3, 5] = 1e6
    with pytest.raises(
        ModelError, match=rf"^{LAYER}: found a scale of 5e\+05, beyond float16; use --scale_dtype float32"
    ):
        list(quantize(model, recipe(tmp_path, "rtn")))
    assert (
        len(list(quantize(model, recipe(tmp_path, "rtn", scale_dtype="float32", output_dir=str(tmp_path / "2"))))) == 2
    )


# Model folders


def damage(folder: Path, change: Callable[[bytes], bytes]) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(change(file.read_bytes()))


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda folder: damage(folder, lambda content: content[:-100]), r"00002\S*: found a damaged or trunc"),
    "header": (lambda folder: damage(folder, lambda content: b"\xff" * 8 + content[8:]), r"00002\S*: found a damaged"),
    "emptied": (lambda folder: damage(folder, lambda content: b""), r"00002\S*: found a damaged or truncated file"),
    "a shard is missing": (lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(), "found no model-00002"),
    "no weights": (lambda folder: [file.unlink() for file in folder.glob("model*")], "model: found no weights; needed"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "model: found no config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text('{"a'), "config.json: found invalid JSON"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_hold_no_model(case: str, source: Path, tmp_path: Path) -> None:
    spoil, message = FOLDERS[case]
    spoil(source)
    with pytest.raises(ModelError, match=message) as caught:
        quantize(source, recipe(tmp_path))
    assert caught.value.exit_status == 1
    assert left_behind(tmp_path) == ["model"]


def test_a_tensor_is_missing(source: Path, tmp_path: Path) -> None:
    for file in source.glob("model*"):
        file.unlink()
    make().save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    del tensors[f"{LAYER}.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"model: found no tensor {LAYER}\.weight \(1 are missing\)"):
        quantize(source, recipe(tmp_path))


@pytest.mark.parametrize("name", ["", "folder", "folder/missing", "missing.gguf"])
def test_models_that_are_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="found no"):
        quantize(str(tmp_path / name) if name else name, recipe(tmp_path))
    assert left_behind(tmp_path) == []


# Data

DATA: dict[str, tuple[dict[str, Any], str]] = {
    "fewer rows than a batch": ({"dataset": rows(count=3)}, r"found 3 of 16 rows of 16 tokens .*needed 4, one batch"),
    "fewer rows than a step sums up": (
        {"dataset": rows(count=6), "gradient_accumulate_steps": 2}, "found 6 of 16 rows .*needed 8, one batch"),
    "no rows": ({"dataset": []}, "dataset: found an empty sequence"),
    "ids of another vocabulary": ({"dataset": [*rows(count=15), [96] * 16]}, r"found token id 96; needed 0 to 95"),
    "text without a tokenizer": ({"dataset": ["some text"] * 20}, "found no tokenizer with a model in memory"),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_used(case: str, tmp_path: Path) -> None:
    settings, message = DATA[case]
    with pytest.raises(AutoRoundError, match=message) as caught:
        quantize(make(), recipe(tmp_path, **settings)).export()
    assert isinstance(caught.value, DataError | ModelError)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.txt", "folder/missing.parquet"])
def test_data_files_that_are_not_there(name: str, source: Path, tmp_path: Path) -> None:
    from tests.data.words import make_tokenizer

    make_tokenizer().save_pretrained(source)
    with pytest.raises(DataError, match=name):
        quantize(source, recipe(tmp_path, dataset=str(tmp_path / name))).export()
    assert left_behind(tmp_path) == ["model"]


# Settings that only the end of a run needs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_shard_size": "large"}, "max_shard_size: found 'large'; needed a size"),
        ({"format": ("auto_round", "exl3")}, "format: found 'exl3'; needed one of"),
        ({"format": ("auto_gptq",), "scale_dtype": "float32"}, "format auto_gptq: found scale_dtype float32"),
        ({"group_size": 7, "odd_shapes": "fail"}, r"model.layers.0.self_attn.q_proj: in_features 64 is not a multiple"),
    ],
)
def test_settings_are_refused_before_any_work(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        quantize(make(), recipe(tmp_path, **settings))
    assert left_behind(tmp_path) == []


# Output folders


@pytest.mark.parametrize("formats", [("auto_round",), ("auto_round", "fake")])
def test_a_folder_that_is_not_ours_is_refused_before_any_work(formats: tuple[str, ...], tmp_path: Path) -> None:
    out, events = tmp_path / "out", []
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    made = recipe(tmp_path, "rtn", format=formats)
    with pytest.raises(FormatError, match=r"out: found other files; needed an empty folder; .*--overwrite"):
        quantize(tmp_path / "model that is never opened", made, on_progress=events.append)
    assert events == []
    assert left_behind(tmp_path) == ["out"]
    assert left_behind(out) == ["thesis.tex"]
    quantize(make(), recipe(tmp_path, "rtn", format=formats, overwrite=True)).export()
    assert "thesis.tex" not in left_behind(out) or len(formats) > 1


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FormatError, match="out: found a file; needed a folder or nothing"):
            quantize(make(), recipe(tmp_path, "rtn", overwrite=overwrite))
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_folder_and_our_own_are_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    made = recipe(tmp_path, "rtn")
    (first,) = quantize(make(), made).export()
    before = hashes(first)
    (again,) = quantize(make(), made).export()  # its journal lies beside it
    assert hashes(again) == before
    (tmp_path / "out.journal" / "manifest.json").unlink()
    with pytest.raises(FormatError, match="out: found other files"):
        quantize(make(), made)


def test_other_formats_of_an_earlier_run_are_not_replaced(tmp_path: Path) -> None:
    quantize(make(), recipe(tmp_path, "rtn", format=("auto_round", "fake"))).export()
    before = hashes(tmp_path / "out")
    with pytest.raises(FormatError, match=r"out: found auto_round, fake; needed a folder without other formats"):
        quantize(make(), recipe(tmp_path, "rtn"))
    assert hashes(tmp_path / "out") == before
    (folder,) = quantize(make(), recipe(tmp_path, "rtn", overwrite=True)).export()
    assert folder == tmp_path / "out"
    assert (folder / "config.json").exists()


def test_the_end_of_a_link_is_written_and_a_mounted_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    for _ in range(2):
        quantize(make(), recipe(tmp_path, "rtn")).export()
        assert (tmp_path / "disk" / "real" / "config.json").exists()
        assert (tmp_path / "out").is_symlink()
        assert left_behind(tmp_path / "disk") == ["real"]
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "out")
    with pytest.raises(FormatError, match="out: found a mounted disk; needed a folder that can be renamed"):
        quantize(make(), recipe(tmp_path, "rtn", overwrite=True))


# Full disks: a limit on the size of files fails every write beyond it, as a full disk does.


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("preset", "written"), [("default", "activations"), ("rtn", "blocks")])
def test_a_journal_that_cannot_be_written(preset: str, written: str, tmp_path: Path) -> None:
    """What is there stays whole, and the run goes on when there is space again."""
    run = quantize(make(), recipe(tmp_path, preset))
    with largest_file(20_000), pytest.raises(JournalError, match=rf"{written}/0\S*: .*; needed .*space; run again"):
        list(run)
    files = {path.name for path in (tmp_path / "out.journal").rglob("*") if path.is_file()}
    assert files - {"lock"} == {"manifest.json", "run.yaml"}
    quantize(make(), recipe(tmp_path, preset)).export()
    whole = tune(make(), tmp_path / "whole", preset).export()
    assert hashes(tmp_path / "out") == hashes(whole[0])


def test_not_even_a_manifest_fits(tmp_path: Path) -> None:
    with largest_file(100), pytest.raises(JournalError, match=r"manifest\.json: .*needed a writable folder with space"):
        list(quantize(make(), recipe(tmp_path, "rtn")))
    assert set(left_behind(tmp_path / "out.journal")) <= {"lock"}
    assert len(list(quantize(make(), recipe(tmp_path, "rtn")))) == 2


@pytest.mark.parametrize("formats", [("auto_round",), ("auto_round", "fake")])
def test_an_export_that_cannot_be_written(formats: tuple[str, ...], tmp_path: Path) -> None:
    events: list[Progress] = []
    run = quantize(make(), recipe(tmp_path, "rtn", format=formats), on_progress=events.append)
    assert len(list(run)) == 2
    with largest_file(20_000), pytest.raises(FormatError, match=r"out\S*: .*use another --output_dir"):
        run.export()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "out.journal" not in str(path)]
    assert ".out.partial" not in left_behind(tmp_path)
    assert len(run.export()) == len(formats)


def test_a_failed_export_leaves_the_old_one(tmp_path: Path) -> None:
    run = tune(make(), tmp_path, "rtn")
    run.export()
    before = hashes(tmp_path / "out")
    with largest_file(20_000), pytest.raises(FormatError):
        run.export()
    assert hashes(tmp_path / "out") == before
    assert left_behind(tmp_path) == ["out", "out.journal"]
