"""Whole runs of tiny models: what is tuned, and what it tells."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from autoround.engine import quantize
from autoround.errors import ModelError
from autoround.func.types import IntCodes
from autoround.hub import load
from autoround.journal import Journal
from autoround.progress import Progress
from tests.data.words import make_tokenizer, words
from tests.engine.small import (
    codes,
    divergence,
    equal_share,
    hashes,
    make,
    nearest,
    recipe,
    replaced,
    rows,
    tune,
)


def assert_same(one: dict[str, IntCodes], two: dict[str, IntCodes]) -> None:
    assert list(one) == list(two)
    for path in one:
        assert all(torch.equal(own, other) for own, other in zip(one[path], two[path], strict=True)), path


# Models


def test_a_folder_with_a_tokenizer_and_text(tmp_path: Path) -> None:
    tokenizer, source = make_tokenizer(), tmp_path / "source"
    make(vocab_size=len(tokenizer)).save_pretrained(source)
    tokenizer.save_pretrained(source)
    run = quantize(source, recipe(tmp_path, dataset=[words(100, first) for first in range(0, 300, 100)]))
    (folder,) = run.export()
    assert folder == tmp_path / "out"
    assert AutoTokenizer.from_pretrained(folder)("w1 w2").input_ids == tokenizer("w1 w2").input_ids
    prompt = torch.tensor([tokenizer("w5 w6").input_ids])
    assert load(folder).generate(prompt, max_new_tokens=3, do_sample=False).shape == (1, 5)


def test_a_model_in_memory_is_not_changed(tmp_path: Path) -> None:
    model = make().requires_grad_(True).train()
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    tune(model, tmp_path).export()
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)), name
    assert model.config.to_dict() == config
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_a_folder_and_memory_give_the_same_files(tmp_path: Path) -> None:
    model = make("llama_tied")
    model.save_pretrained(tmp_path / "source", max_shard_size="50KB")
    from_memory = tune(model, tmp_path / "memory").export()
    from_folder = tune(tmp_path / "source", tmp_path / "folder").export()
    ours, theirs = (hashes(folder) for (folder,) in (from_memory, from_folder))
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert ours["config.json"] == theirs["config.json"]


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "gemma3"])
def test_tuning_beats_rounding_to_nearest(name: str, tmp_path: Path) -> None:
    model = make(name)
    plain = tune(model, tmp_path / "rtn", "rtn")
    tuned = tune(model, tmp_path / "tuned", iters=20)
    journal = Journal(tuned.journal_folder, {})
    for index in range(len(tuned.plan.blocks)):
        stats = journal.read_stats(index)
        assert stats["loss_last"] < 0.8 * stats["loss_first"]
    assert divergence(replaced(name, tuned), model) < 0.7 * divergence(replaced(name, plain), model)
    outside = tuned.plan.layers["lm_head"]
    tied = {"llama": "", "llama_tied": "model.embed_tokens", "gpt2": "transformer.wte", "gemma3": "model.embed_tokens"}
    assert (outside.spec, outside.shape.tied_to) == (None, tied[name])


# Settings


def test_where_a_hub_model_is_found_is_asked_as_the_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def refuse(model: str, **settings: Any) -> None:
        asked.update(settings, model=model)
        raise ModelError("asked")

    monkeypatch.setattr("autoround.engine.open_model", refuse)
    where = {"revision": "v2", "cache_dir": "cache", "token": "hf_secret", "trust_remote_code": True}
    made = recipe(tmp_path, **where)
    with pytest.raises(ModelError, match="asked"):
        quantize("org/private", made)
    assert asked | where | {"model": "org/private"} == asked
    assert "hf_secret" not in repr(made)


def test_a_token_is_not_kept(tmp_path: Path) -> None:
    run = tune(make(), tmp_path, "rtn", token="hf_secret")
    assert "hf_secret" not in (run.journal_folder / "manifest.json").read_text()


def test_nearest_needs_no_data_and_no_steps(tmp_path: Path) -> None:
    model, steps = make(), []
    run = quantize(model, recipe(tmp_path, "rtn", dataset=None), on_progress=lambda event: steps.append(event.step))
    done = list(run)
    assert [(each.loss_first, each.loss_best, each.loss_last) for each in done] == [(0, 0, 0)] * 2
    assert not any(steps)
    assert not (run.journal_folder / "activations").exists()
    assert_same(codes(run), nearest(model, run))


def test_opt_rtn_searches_clips_and_takes_no_step(tmp_path: Path) -> None:
    model = make()
    run = tune(model, tmp_path / "opt", "opt_rtn", bits=4)
    plain = tune(model, tmp_path / "rtn", "rtn", bits=4)
    assert Journal(run.journal_folder, {}).read_stats(0) == {}
    assert divergence(replaced("llama", run), model) < divergence(replaced("llama", plain), model)
    scales = [own.scale_OG for own in codes(run).values()]
    full = [own.scale_OG for own in codes(plain).values()]
    smaller = [bool((ours.abs() <= theirs.abs()).all()) for ours, theirs in zip(scales, full, strict=True)]
    assert all(smaller)
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(scales, full, strict=True))


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    model = make()
    settings: list[dict[str, int]] = [
        {"batch_size": 4}, {"batch_size": 2, "gradient_accumulate_steps": 2}, {"batch_size": 2}
    ]  # fmt: skip
    runs = [tune(model, tmp_path / str(index), dtype="float32", **each) for index, each in enumerate(settings)]
    whole, parts, other = map(codes, runs)
    assert equal_share(whole, parts) > 0.999
    assert equal_share(whole, other) < 0.9
    losses = [Journal(run.journal_folder, {}).read_stats(0) for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_adam_is_another_optimizer(tmp_path: Path) -> None:
    model, settings = make(), {"iters": 12, "lr": 0.02}
    adam, sign = (tune(model, tmp_path / str(adam), adam=adam, **settings) for adam in (True, False))
    stats = Journal(adam.journal_folder, {}).read_stats(0)
    assert stats["loss_last"] < 0.9 * stats["loss_first"]
    assert equal_share(codes(adam), codes(sign)) < 0.99


def test_the_best_or_the_last_parameters_are_kept(tmp_path: Path) -> None:
    """Clips that fall to 0 make the first loss the lowest: the best parameters are then those the run began with."""
    model = make()
    settings: dict[str, Any] = {"lr": 1e-9, "minmax_lr": 10.0, "bits": 4}
    best, last = (tune(model, tmp_path / keep, keep=keep, **settings) for keep in ("best", "last"))
    stats = Journal(best.journal_folder, {}).read_stats(0)
    assert stats["loss_best"] == stats["loss_first"] < stats["loss_last"]
    first = [path for path in best.plan.specs if path.startswith("model.layers.0.")]
    plain = nearest(model, best)
    assert_same({path: codes(best)[path] for path in first}, {path: plain[path] for path in first})
    assert equal_share(codes(last), plain) < 0.9


def test_equal_runs_are_equal_and_a_seed_makes_another(tmp_path: Path) -> None:
    model = make()
    first, again = (codes(tune(model, tmp_path / name)) for name in ("first", "again"))
    assert_same(first, again)
    assert equal_share(first, codes(tune(model, tmp_path / "seed", seed=7))) < 1


def test_padded_rows_and_rows_of_odd_number(tmp_path: Path) -> None:
    """15 rows do not fill batches of 4, and some end in padding."""
    data = [row[: 8 + index] for index, row in enumerate(rows(count=15))]
    run = tune(make(), tmp_path, dataset=data, nsamples=15)
    assert len(codes(run)) == 14


# Progress


def test_progress_tells_phases_blocks_and_losses(tmp_path: Path) -> None:
    events: list[Progress] = []
    run = quantize(make(), recipe(tmp_path), on_progress=events.append)
    done = list(run)
    run.export()
    assert list(dict.fromkeys(event.phase for event in events)) == ["calibration", "tuning", "export"]
    assert {event.blocks for event in events} == {2}
    first = [event for event in events if event.step == 1]
    assert [event.block for event in first] == [1, 2]
    assert (
        [event.loss for event in first] == [event.loss_first for event in first] == [each.loss_first for each in done]
    )
    assert all(event.steps == 6 and event.memory_bytes > 0 for event in first)
    assert first[0].eta_seconds is None  # no pace is known yet
    assert first[1].eta_seconds is not None
    assert first[1].eta_seconds > 0
    seconds = [event.seconds for event in events]
    assert seconds == sorted(seconds)
    assert [(each.index, each.path, each.resumed) for each in done] == [
        (0, "model.layers.0", False),
        (1, "model.layers.1", False),
    ]
    assert all(each.loss_best <= min(each.loss_first, each.loss_last) and each.seconds > 0 for each in done)
