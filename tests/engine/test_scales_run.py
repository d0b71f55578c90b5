"""Runs that tune the scales of all blocks after the last one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from autoround.engine import Run, quantize
from autoround.errors import JournalError, UsageError
from autoround.export import Target, export_journal
from autoround.hub import load
from autoround.journal import SCALES, Journal
from autoround.progress import Progress
from autoround.recipe import Recipe
from autoround.slots import Slots
from tests.engine import mixtures
from tests.engine.small import VOCABULARY, codes, divergence, equal_share, hashes, make, recipe, replaced, tune
from tests.engine.test_gguf_run import WIDE
from tests.formats import gguf_models
from tests.formats.gguf_tokenizers import sentencepiece


def scaled(folder: Path, steps: int = 48, **settings: Any) -> Recipe:
    return recipe(folder, scale_steps=steps, **settings)


def finish(model: Any, made: Recipe) -> Run:
    run = quantize(model, made)
    list(run)
    return run


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma3"])
def test_predictions_come_closer_and_codes_stay(name: str, tmp_path: Path) -> None:
    model = make(name)
    plain, tuned = tune(model, tmp_path / "plain"), finish(model, scaled(tmp_path / "tuned"))
    assert divergence(replaced(name, tuned), model) < 0.85 * divergence(replaced(name, plain), model)
    for path, own in codes(tuned).items():
        before = codes(plain)[path]
        assert torch.equal(own.q_OI, before.q_OI)
        assert torch.equal(own.zero_OG, before.zero_OG)
        assert own.scale_OG.dtype == before.scale_OG.dtype
        assert float((own.scale_OG != before.scale_OG).float().mean()) > 0


def test_a_mixture(tmp_path: Path) -> None:
    model = mixtures.make("qwen3_moe")
    plain, tuned = tune(model, tmp_path / "plain"), finish(model, scaled(tmp_path / "tuned"))
    after, before = (mixtures.replaced(mixtures.make("qwen3_moe"), run) for run in (tuned, plain))
    assert divergence(after, model) < 0.9 * divergence(before, model)


def test_compiled_steps_and_padding(tmp_path: Path) -> None:
    model = make()
    data = [row[: 8 + index] for index, row in enumerate(recipe(tmp_path).dataset)]
    runs = [finish(model, scaled(tmp_path / str(on), 4, dataset=data, torch_compile=on)) for on in (True, False)]
    one, two = (divergence(replaced("llama", run), model) for run in runs)
    assert one == pytest.approx(two, rel=0.05)


def test_every_format_stores_them(tmp_path: Path) -> None:
    model = make()
    run = finish(model, scaled(tmp_path, 4, bits=4, format=("auto_round", "auto_gptq", "llm_compressor", "fake")))
    expected = replaced("llama", run)
    for folder in run.export():
        assert divergence(load(folder, dtype="float32"), expected) < 1e-4


def test_without_steps_of_blocks_no_rows_flow_through_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = make(), recipe(tmp_path / "tuned", "rtn", scale_steps=48, torch_compile=True)
    plain = tune(model, tmp_path / "plain", "rtn")
    monkeypatch.setattr(Slots, "write", lambda *args: pytest.fail("rows were kept"))
    run = finish(model, made)
    assert run.numerics.compiler is not None
    assert divergence(replaced("llama", run), model) < 0.85 * divergence(replaced("llama", plain), model)


def test_blocks_with_functions_of_their_own(tmp_path: Path) -> None:
    """Bloom's activation is an autograd.Function that torch.func does not take."""
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.2)
    torch.manual_seed(0)
    run = finish(BloomForCausalLM(config).eval(), scaled(tmp_path, 4, torch_compile=False))
    assert Journal(run.journal_folder, {}).scale_steps() == 4


def test_gguf_blocks(tmp_path: Path) -> None:
    model = gguf_models.make("llama", **WIDE)
    made = {"format": ("gguf:q4_k_m",), "bits": None, "group_size": None}
    run = quantize(model, scaled(tmp_path, 4, **made), tokenizer=sentencepiece())
    run.export()
    journal = Journal(run.journal_folder, {})
    for index in range(len(run.plan.blocks)):
        before, after = journal.read_codes(index), journal.read_block(index)
        for path in before:
            assert torch.equal(before[path].q_OI, after[path].q_OI)
            assert torch.equal(before[path].scale_OG, after[path].scale_OG)
            assert not torch.equal(before[path].d_OK, after[path].d_OK)


def test_they_are_tuned_from_finished_blocks_and_taken_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make().save_pretrained(source)
    plain, at_once = (finish(source, scaled(tmp_path / name, steps)) for name, steps in (("plain", 0), ("once", 5)))
    first = [hashes(folder) for folder in plain.export()]
    later = quantize(source, scaled(tmp_path / "plain", 5, overwrite=False))
    assert [done.resumed for done in later] == [True, True]
    assert [hashes(folder) for folder in later.export()] == [hashes(folder) for folder in at_once.export()] != first
    assert [hashes(folder) for folder in finish(source, scaled(tmp_path / "plain", 0)).export()] == first


def test_a_run_that_ends_among_them_goes_on(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make().save_pretrained(source)

    def stop(progress: Progress) -> None:
        if progress.phase == "scales" and progress.step == 2:
            raise KeyboardInterrupt

    whole, made = finish(source, scaled(tmp_path / "whole", 5)), scaled(tmp_path / "stopped", 5)
    with pytest.raises(KeyboardInterrupt):
        list(quantize(source, made, on_progress=stop))
    journal = Path(f"{made.output_dir}.journal")
    with pytest.raises(JournalError, match="found blocks whose scales are not tuned yet; needed those of 5 steps"):
        export_journal(journal, Target(folder=tmp_path / "late", formats=("auto_round",)))
    again = quantize(source, made)
    folders = again.export()
    assert [hashes(folder) for folder in folders] == [hashes(folder) for folder in whole.export()]
    (late,) = export_journal(journal, Target(folder=tmp_path / "late", formats=("auto_round",)))
    assert hashes(late) == hashes(folders[0])


def test_earlier_scales_stay_until_there_are_others(tmp_path: Path) -> None:
    source, steps = tmp_path / "source", list[int]()
    make().save_pretrained(source)
    first = [hashes(folder) for folder in finish(source, scaled(tmp_path, 5)).export()]

    def stop(progress: Progress) -> None:
        if progress.phase == "scales" and progress.step:
            steps.append(progress.step)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(quantize(source, scaled(tmp_path, 7), on_progress=stop))
    again = quantize(source, scaled(tmp_path, 5, overwrite=False), on_progress=stop)
    assert [hashes(folder) for folder in again.export()] == first
    assert steps == [1]


def test_damaged_scales_can_be_tuned_again(tmp_path: Path) -> None:
    model, made = make(), scaled(tmp_path, 5)
    run = finish(model, made)
    file, before = run.journal_folder / SCALES, codes(run)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(JournalError, match=r"scales\.safetensors: .*delete it, and the scales are tuned again"):
        list(quantize(model, made))
    file.unlink()
    assert equal_share(codes(finish(model, made)), before) == 1


def test_a_model_that_is_kept_whole_has_none(tmp_path: Path) -> None:
    model, words = gguf_models.make("llama", **WIDE), sentencepiece()
    made: dict[str, Any] = {"format": ("gguf:f16",), "bits": None, "group_size": None}
    run = quantize(model, scaled(tmp_path, 5, **made), tokenizer=words)
    assert not run.plan.specs
    at_once, target = run.export(), Target(folder=tmp_path / "late", formats=made["format"])
    late = export_journal(run.journal_folder, target, model=model, tokenizer=words)
    assert [hashes(folder) for folder in at_once] == [hashes(folder) for folder in late]


def test_progress_of_the_scales(tmp_path: Path) -> None:
    events: list[Progress] = []
    list(quantize(make(), scaled(tmp_path, 6), on_progress=events.append))
    own = [event for event in events if event.phase == "scales" and event.step]
    assert [event.step for event in own] == [1, 2, 3, 4, 5, 6]
    assert own[-1].eta_seconds == 0
    assert all(event.steps == 6 and event.loss_first == own[0].loss for event in own)
    before = [event for event in events if event.phase == "tuning" and event.eta_seconds is not None]
    assert before and all(event.then == "scales" for event in before)


def test_named_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="scale_steps: found 3 with device_map .* needed blocks that lie on one device"
    ):
        quantize(make(), scaled(tmp_path, 3, device_map="{mlp: cpu}"))
