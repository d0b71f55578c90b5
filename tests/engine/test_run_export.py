"""What a run of a tiny model writes."""

from pathlib import Path

import pytest
import torch

from autoround.engine import quantize
from autoround.errors import FormatError, UsageError
from autoround.hub import load
from tests.engine.small import (
    hashes,
    logits,
    make,
    recipe,
    replaced,
    tune,
)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_every_layout_computes_what_the_codes_say(name: str, tmp_path: Path) -> None:
    formats = ("auto_round", "auto_gptq", "fake")
    run = tune(make(name), tmp_path, "rtn", format=formats, bits=4)
    folders = run.export()
    assert folders == tuple(tmp_path / "out" / form for form in formats)
    for form, folder in zip(formats, folders, strict=True):
        expected = replaced(name, run, kept=torch.float16 if form == "auto_gptq" else torch.float32)
        torch.testing.assert_close(logits(load(folder, dtype="float32")), logits(expected), rtol=1e-4, atol=1e-4)


def test_tuned_asymmetric_codes_are_exported_as_they_are(tmp_path: Path) -> None:
    run = tune(make(), tmp_path, sym=False, bits=3, group_size=-1)
    (folder,) = run.export()
    torch.testing.assert_close(logits(load(folder)), logits(replaced("llama", run)), rtol=1e-4, atol=1e-4)


def test_more_layouts_can_follow_later(tmp_path: Path) -> None:
    run = tune(make(), tmp_path, "rtn", max_shard_size="50KB")
    assert run.export() == (tmp_path / "out",)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    later = run.export(tmp_path / "later", formats=["auto_gptq", "fake"])
    assert later == (tmp_path / "later" / "auto_gptq", tmp_path / "later" / "fake")
    torch.testing.assert_close(logits(load(later[1])), logits(load(tmp_path / "out")), rtol=1e-4, atol=1e-4)


def test_a_layout_that_cannot_hold_the_plan_is_refused(tmp_path: Path) -> None:
    run = quantize(make(), recipe(tmp_path, "rtn", bits=4, group_size=64))  # rows of 96 take groups of 32
    needed = "format auto_awq: model.layers.0.mlp.down_proj: found group_size 32; needed 64 as elsewhere"
    with pytest.raises(UsageError, match=needed):
        run.export(tmp_path / "later", formats=["auto_awq"])
    assert list(tmp_path.iterdir()) == []  # known before any work


def test_a_foreign_folder_is_never_overwritten_by_a_late_export(tmp_path: Path) -> None:
    run, mine = tune(make(), tmp_path, "rtn"), tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match="mine: found other files"):
        run.export(mine)
    with pytest.raises(FormatError, match="mine: found other files"):
        run.export(mine, formats=["auto_round", "fake"])
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


def test_export_alone_does_all_the_work(tmp_path: Path) -> None:
    (whole,) = quantize(make(), recipe(tmp_path / "whole")).export()
    run = quantize(make(), recipe(tmp_path / "parts", overwrite=True))
    assert next(iter(run)).index == 0
    journaled = hashes(run.journal_folder)["blocks/00000.safetensors"]
    kept = (run.journal_folder / "blocks" / "00000.safetensors").stat().st_ino
    (folder,) = run.export()
    assert hashes(folder) == hashes(whole)
    assert hashes(run.journal_folder)["blocks/00000.safetensors"] == journaled
    assert (run.journal_folder / "blocks" / "00000.safetensors").stat().st_ino == kept  # the block was not redone
    assert [done.resumed for done in run] == [True, True]
