"""Checkpoints from a journal alone."""

import shutil
from pathlib import Path

import pytest
import torch

from autoround.cli.main import main
from autoround.errors import FormatError, JournalError, ModelError, UsageError
from autoround.export import Target, export_journal
from autoround.hub import load
from autoround.journal import read_manifest, write_manifest
from tests.engine.small import hashes, logits, make, recipe, replaced, stopped, tune

FORMATS = ("auto_round", "auto_round:gptqmodel", "gptq_v2", "auto_awq", "llm_compressor", "fake")


def target(folder: Path, *formats: str) -> Target:
    return Target(folder=folder / "late", formats=formats)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("sym", [True, False])
def test_a_late_export_writes_what_the_run_would(sym: bool, source: Path, tmp_path: Path) -> None:
    run = tune(source, tmp_path, "rtn", bits=4, sym=sym, format=FORMATS)
    at_once = run.export()
    late = export_journal(run.journal_folder, target(tmp_path, *FORMATS))
    assert [folder.name for folder in late] == [folder.name for folder in at_once]
    for one, two in zip(at_once, late, strict=True):
        assert hashes(one) == hashes(two)
        kept = torch.float16 if one.name == "auto_awq" or (one.name == "auto_round" and not sym) else torch.float32
        expected = logits(replaced("llama", run, kept=torch.float16 if one.name == "gptq_v2" else kept))
        torch.testing.assert_close(logits(load(two, dtype="float32")), expected, rtol=1e-4, atol=1e-4)


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tune(source, tmp_path, "rtn", bits=4)
    words = ["export", str(run.journal_folder), "--format", "[AWQ,llm_compressor]", "--output_dir", str(tmp_path / "x")]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(tmp_path / "x" / name) for name in ("auto_awq", "llm_compressor")]
    assert printed.err.splitlines() == [
        f"export: {name} in {tmp_path / 'x' / name}" for name in ("auto_awq", "llm_compressor")
    ]
    assert main(words) == 1
    assert "x: found other files; needed an empty folder" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "x" / "auto_awq"), "--model", "m", "--output_dir", str(tmp_path / "z")]) == 2
    assert "export: found --model for a checkpoint; needed none: it is for journals" in capsys.readouterr().err
    twice = ["export", str(run.journal_folder), "--format", "awq,auto_awq", "--output_dir", str(tmp_path / "y")]
    assert main(twice) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "y")]
    assert main([*words, "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["export", "--format", "auto_awq"]) == 2
    assert "export: found nothing to export; needed the folder OUT.journal" in capsys.readouterr().err
    assert main(["export", "a", "b"]) == 2
    assert main(["export", "a", "--iters", "3"]) == 2


def test_a_model_in_memory_is_given_again(tmp_path: Path) -> None:
    run = tune(make(), tmp_path, "rtn")
    with pytest.raises(JournalError, match="found the codes of a model in memory; needed that model"):
        export_journal(run.journal_folder, target(tmp_path, "fake"))
    (late,) = export_journal(run.journal_folder, target(tmp_path, "fake"), model=make())
    torch.testing.assert_close(logits(load(late)), logits(replaced("llama", run)), rtol=1e-4, atol=1e-4)


def test_a_model_that_moved_and_another_one(source: Path, tmp_path: Path) -> None:
    run, moved = tune(source, tmp_path, "rtn"), tmp_path / "moved"
    shutil.move(source, moved)
    with pytest.raises(ValueError, match="source: found no such folder"):
        export_journal(run.journal_folder, target(tmp_path, "fake"))
    assert export_journal(run.journal_folder, target(tmp_path, "fake"), model=moved)[0].exists()
    make(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(JournalError, match="other: found other weights than those that were quantized"):
        export_journal(run.journal_folder, target(tmp_path / "2", "fake"), model=tmp_path / "other")


def test_flags_win_over_how_the_model_was_opened_then(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = tune(source, tmp_path, "rtn", revision="v1", cache_dir="here"), []

    def refuse(model: str, **settings: object) -> None:
        asked.append({"model": model, **settings})
        raise ModelError("asked")

    monkeypatch.setattr("autoround.export.open_model", refuse)
    words = ["export", str(run.journal_folder), "--format", "fake", "--output_dir", str(tmp_path / "late")]
    assert main(words) == 1
    assert main([*words, "--revision", "v2", "--token", "hf_secret", "--trust_remote_code"]) == 1
    assert main([*words, "--model", "org/other", "--cache_dir", "there"]) == 1
    then = {"model": str(source), "revision": "v1", "cache_dir": "here", "token": None, "trust_remote_code": False}
    expected = [
        then,
        then | {"revision": "v2", "token": "hf_secret", "trust_remote_code": True},
        then | {"model": "org/other", "revision": None, "cache_dir": "there"},
    ]
    assert asked == [each | {"tokenizer": None} for each in expected]


def test_a_run_goes_on_with_a_model_that_moved(source: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path)
    stopped(source, made, after=1)
    shutil.move(source, tmp_path / "moved")
    assert stopped(tmp_path / "moved", made, after=2)[0].resumed


def test_refusals(source: Path, tmp_path: Path) -> None:
    stopped(source, recipe(tmp_path), after=1)
    journal = tmp_path / "out.journal"
    with pytest.raises(JournalError, match="found 1 of 2 blocks; needed all; repeat the command that began it"):
        export_journal(journal, target(tmp_path, "fake"))
    with pytest.raises(UsageError, match="format: found 'nope'"):
        export_journal(journal, target(tmp_path, "nope"))
    with pytest.raises(JournalError, match="manifest.json: .*; needed a journal's manifest"):
        export_journal(tmp_path, target(tmp_path, "fake"))
    manifest = read_manifest(journal)
    del manifest["spec"]
    write_manifest(journal, manifest)
    with pytest.raises(JournalError, match="manifest.json: found no spec; needed the manifest of a run"):
        export_journal(journal, target(tmp_path, "fake"))
    assert not (tmp_path / "late").exists()


def test_codes_that_a_layout_cannot_hold(tmp_path: Path) -> None:
    model = make()
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight.abs_()  # zero points of 0
    run = tune(model, tmp_path, "rtn", sym=False)
    with pytest.raises(FormatError, match=r"layers.1.mlp.up_proj: found \d+ zero points of 0; .* use gptq_v2"):
        export_journal(run.journal_folder, target(tmp_path, "auto_gptq"), model=model)
    assert not (tmp_path / "late").exists()
    with pytest.raises(UsageError, match="format auto_awq: found bits 2"):
        export_journal(run.journal_folder, target(tmp_path, "auto_awq"), model=model)
