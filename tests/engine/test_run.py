"""Whole runs of tiny models: what is tuned, what is exported, and by which functions."""

import ast
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._dynamo.utils import get_compilation_metrics as compilations
from transformers import AutoTokenizer

import autoround
from autoround import func
from autoround.engine import quantize
from autoround.errors import FormatError, ModelError, UsageError
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
    logits,
    make,
    nearest,
    recipe,
    replaced,
    rows,
    tune,
)

PACKAGE = Path(autoround.__file__).parent


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
    run = tune(model, tmp_path / "opt", "opt_rtn")
    plain = tune(model, tmp_path / "rtn", "rtn")
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


# Export


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


# One loop, through autoround.func


def calls(tree: ast.AST, name: str) -> int:
    """How often a function or method of this name is called."""
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [each.attr if isinstance(each, ast.Attribute) else each.id
             for each in functions if isinstance(each, ast.Attribute | ast.Name)]  # fmt: skip
    return names.count(name)


def test_there_is_one_loop() -> None:
    trees = {file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")}

    def callers(name: str) -> dict[str, int]:
        counts = {file: calls(tree, name) for file, tree in trees.items()}
        return {file: count for file, count in counts.items() if count and not file.startswith("func/")}

    assert callers("tune_block") == {"tuner.py": 1}  # the loop over steps
    assert callers("tune") == {"engine.py": 1}  # the loop over blocks
    assert callers("write_block") == {"engine.py": 2}  # after a block, and after the layers outside all blocks
    for name in ("backward", "make_step", "make_gradient", "fake_quantize"):  # no second tuner
        assert set(callers(name)) <= {"tuner.py"}, name


class Probe:
    """Notes how the engine uses ``autoround.func``, and returns the parameters it was given as if they were tuned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Any] = []
        self.tuned: list[tuple[Any, int, int]] = []
        self._make_step = func.make_step
        monkeypatch.setattr(func, "make_step", self.make_step)
        monkeypatch.setattr(func, "tune_block", self.tune_block)

    def make_step(self, *args: Any, **settings: Any) -> Any:
        self.made.append(self._make_step(*args, **settings))
        return self.made[-1]

    def tune_block(self, step: Any, weights: Any, state: Any, batches: Any, *, on_step: Any) -> func.TuneResult:
        del on_step  # nothing to tell
        (shared,) = weights.tuned.values()
        self.tuned.append((step, len(shared.weight_OGS), len(list(batches))))
        return func.TuneResult(state.params, torch.zeros(0))


@pytest.mark.parametrize(("name", "steps"), [("llama_3", [0, 0, 0]), ("gemma3", [0, 1, 0])])
def test_the_engine_runs_through_the_functional_tuner(
    name: str, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its codes are those of whatever ``tune_block`` returns, and blocks of one structure share one step."""
    probe, model = Probe(monkeypatch), make(name)
    run = tune(model, tmp_path)
    assert_same(codes(run), nearest(model, run))
    assert [probe.made.index(step) for step, _, _ in probe.tuned] == steps
    assert len(probe.made) == len(set(steps))
    sizes = [
        sum(own.scale_OG.numel() for own in journaled.values())
        for journaled in map(Journal(run.journal_folder, {}).read_block, range(3))
    ]
    assert [groups for _, groups, _ in probe.tuned] == sizes  # one shared tensor for all layers
    assert [count for _, _, count in probe.tuned] == [6, 6, 6]


@pytest.mark.slow
def test_one_compilation_serves_all_blocks(tmp_path: Path) -> None:
    """Beside the step, the clip search compiles what it tries its candidates with."""
    model, settings = make("llama_3"), {"clip_search": True, "lr": 0.01}
    eager = tune(model, tmp_path / "eager", torch_compile=False, **settings)
    torch.compiler.reset()
    counters.clear()
    before = len(compilations())
    compiled = tune(model, tmp_path / "compiled", torch_compile=True, **settings)
    names = sorted(str(metrics.co_name) for metrics in compilations()[before:])
    assert names == ["rounding_errors", "step"]
    assert counters["stats"]["unique_graphs"] == len(names)
    assert not counters["graph_break"]
    assert equal_share(codes(eager), codes(compiled)) > 0.9
    for index in range(3):
        ours, theirs = (Journal(run.journal_folder, {}).read_stats(index) for run in (compiled, eager))
        assert ours["loss_first"] == pytest.approx(theirs["loss_first"], rel=0.1)
