"""Whole runs on mixtures of experts: what is written, loaded, converted, and what the journal tells."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from autoround import tuner
from autoround.convert import open_quantized
from autoround.coverage import coverage, coverage_table
from autoround.engine import Run, quantize
from autoround.errors import UsageError
from autoround.export import Target, export_checkpoint
from autoround.formats.packed_experts import PackedExperts
from autoround.hub import load
from autoround.journal import Journal
from tests.engine import mixtures, small
from tests.engine.small import ROWS, TOKENS, recipe

PACKED = ("auto_round", "llm_compressor")
GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of tiny runs see few tokens."""
    monkeypatch.setattr(tuner, "STARVED_TOKENS", 1)


def tune(name: str, folder: Path, **settings: Any) -> Run:
    own: dict[str, Any] = {"bits": 4, "iters": 4, "torch_compile": False, "format": ("fake",)}
    run = quantize(mixtures.make(name), recipe(folder, **own | settings))
    assert len(list(run)) == 2
    return run


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(small.rows())).logits


@pytest.mark.filterwarnings("ignore:Casting complex values to real")  # DeepSeek-V2 rotates by complex numbers
@pytest.mark.parametrize("name", mixtures.APART)
def test_written_weights_are_those_of_the_codes(name: str, tmp_path: Path) -> None:
    run = tune(name, tmp_path)
    (folder,) = run.export()
    written = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for each, wanted in mixtures.replaced(mixtures.make(name), run).state_dict().items():
        assert torch.equal(written[each], wanted), each


def test_a_run_from_a_folder_is_that_of_its_model_in_memory(tmp_path: Path) -> None:
    mixtures.make("mixtral").save_pretrained(tmp_path / "model")
    memory = tune("mixtral", tmp_path / "memory")
    folder = quantize(tmp_path / "model", recipe(tmp_path / "folder", bits=4, iters=4, torch_compile=False))
    list(folder)
    one, two = small.codes(memory), small.codes(folder)
    assert small.equal_share(one, two) == 1
    names = [set(load_file(run.export(formats=["fake"])[0] / "model.safetensors")) for run in (memory, folder)]
    assert names[0] == names[1] == set(load_file(tmp_path / "model" / "model.safetensors"))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_packed_experts_compute_what_the_codes_stand_for(name: str, tmp_path: Path) -> None:
    run = tune(name, tmp_path, format=PACKED)
    wanted = logits(mixtures.replaced(mixtures.make(name), run))
    for folder in run.export():
        model = load(folder, dtype=torch.float32)
        assert sum(isinstance(module, PackedExperts) for module in model.modules()) == 2
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_a_stack_may_stay_unquantized_beside_a_packed_one(tmp_path: Path) -> None:
    run = tune("qwen3_moe", tmp_path, format=("auto_round", "fake"), ignore_layers="experts.down_proj")
    assert DOWN not in run.plan.specs and GATE_UP in run.plan.specs
    folder, _ = run.export()
    stored = load_file(folder / "model.safetensors")
    assert stored["model.layers.1.mlp.experts.3.down_proj.weight"].shape == (64, 32)
    assert stored["model.layers.1.mlp.experts.3.up_proj.qweight"].dtype == torch.int32
    wanted = logits(mixtures.replaced(mixtures.make("qwen3_moe"), run))
    torch.testing.assert_close(logits(load(folder, dtype=torch.float32)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ignored", ["", "experts.gate_up_proj"])
def test_experts_that_checkpoints_stack_are_packed_one_by_one(ignored: str, tmp_path: Path) -> None:
    run = tune(mixtures.STACKED, tmp_path, format=("auto_round",), ignore_layers=ignored)
    wanted = logits(mixtures.replaced(mixtures.make(mixtures.STACKED), run))
    assert not torch.allclose(wanted, logits(mixtures.make(mixtures.STACKED)), rtol=1e-2)
    assert any(note.startswith(f"{2 if ignored else 4} stacks of experts") for note in run.plan.notes)
    (folder,) = run.export()
    stored = load_file(folder / "model.safetensors")
    assert "model.layers.1.mlp.experts.3.down_proj.qweight" in stored
    assert ("model.layers.1.mlp.experts.3.gate_up_proj.qweight" in stored) == (not ignored)
    torch.testing.assert_close(logits(load(folder, dtype=torch.float32)), wanted, rtol=1e-4, atol=1e-4)
    export_checkpoint(folder, Target(folder=tmp_path / "again", formats=("auto_round:auto_gptq",)))
    torch.testing.assert_close(logits(load(tmp_path / "again", dtype=torch.float32)), wanted, rtol=1e-4, atol=1e-4)
    export_checkpoint(folder, Target(folder=tmp_path / "fake", formats=("fake",)))
    torch.testing.assert_close(logits(load(tmp_path / "fake")), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="hold all experts in one tensor, for which llm_compressor has no place"):
        export_checkpoint(folder, Target(folder=tmp_path / "other", formats=("llm_compressor",)))


def test_one_layout_becomes_another_code_for_code(tmp_path: Path) -> None:
    run = tune("mixtral", tmp_path, format=("auto_round",))
    (folder,) = run.export()
    for form in ("llm_compressor", "fake"):
        export_checkpoint(folder, Target(folder=tmp_path / form, formats=(form,)))
    again = open_quantized(tmp_path / "llm_compressor")
    found = {
        f"{part.prefix}{relative}": own
        for index, part in enumerate(again.plan.parts)
        for relative, own in again.read_block(index).items()
    }
    for path, codes in small.codes(run).items():
        assert all(torch.equal(one, two) for one, two in zip(codes, found[path], strict=True)), path
    (direct,) = run.export(tmp_path / "direct", formats=["fake"])
    one, two = (load_file(each / "model.safetensors") for each in (direct, tmp_path / "fake"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_starved_experts_stay_where_they_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = small.codes(tune("mixtral", tmp_path / "tuned"))
    monkeypatch.setattr(tuner, "STARVED_TOKENS", 10**9)
    kept = small.codes(tune("mixtral", tmp_path / "kept"))
    rounded = small.codes(tune("mixtral", tmp_path / "rounded", preset="rtn", iters=0))
    other = "model.layers.0.self_attn.q_proj"
    first = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(kept[first].q_OI, rounded[first].q_OI)
    assert not torch.equal(tuned[first].q_OI, rounded[first].q_OI)
    assert torch.equal(kept[other].q_OI, tuned[other].q_OI)


def test_starved_experts_take_steps_when_all_tokens_are_sent_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "STARVED_TOKENS", 128)
    one, two = (tune("qwen3_moe", tmp_path / policy, starved_experts=policy) for policy in ("rtn", "route_all"))
    kept, moved = small.codes(one), small.codes(two)
    counts, same = (coverage(Journal(run.journal_folder, {}).read_stats(0))["mlp.experts"] for run in (one, two))
    assert counts == same and min(counts) < 128 < max(counts)
    other, first = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.down_proj"
    start = small.codes(tune("qwen3_moe", tmp_path / "start", preset="rtn", iters=0))[first].q_OI
    for expert, rows in enumerate(
        zip(*(each.chunk(4) for each in (start, kept[first].q_OI, moved[first].q_OI)), strict=True)
    ):
        assert torch.equal(rows[0], rows[1]) == (counts[expert] < 128)
        assert not torch.equal(rows[0], rows[2])
    assert not torch.equal(kept[other].q_OI, moved[other].q_OI)  # the steps of a block weigh all its experts


def test_policies_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for settings, words in (
        ({"starved_experts": "keep"}, "found keep, which no format can hold"),
        ({"starved_experts": "all"}, "needed one of rtn, route_all"),
        ({"starved_experts": "route_all", "iters": 0}, "found route_all in a run without calibration text"),
    ):
        with pytest.raises(UsageError, match=f"starved_experts: .*{words}"):
            recipe(tmp_path, **settings)


def test_the_journal_tells_how_many_tokens_each_expert_took(tmp_path: Path) -> None:
    run = tune("qwen3_moe", tmp_path)
    journal = Journal(run.journal_folder, {})
    counts = coverage(journal.read_stats(1))["mlp.experts"]
    assert len(counts) == 4 and sum(counts) == 2 * ROWS * TOKENS
    again = [(done.path, done.tokens) for done in run]
    assert again[1] == ("model.layers.1", {"mlp.experts": counts})
    assert coverage_table(again, max(counts)).splitlines()[-1].endswith("3 of 4")


def test_a_stopped_run_goes_on_with_the_same_codes(tmp_path: Path) -> None:
    whole = small.codes(tune("qwen3_moe", tmp_path / "whole"))
    made = recipe(tmp_path / "stopped", bits=4, iters=4, torch_compile=False, format=("fake",))
    small.stopped(mixtures.make("qwen3_moe"), made, after=1)
    run = quantize(mixtures.make("qwen3_moe"), made)
    assert [done.resumed for done in run] == [True, False]
    assert small.equal_share(whole, small.codes(run)) == 1


def test_compiled_float32_is_refused_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from autoround.backends.cpu import CPU

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(CPU), "compute_dtype", lambda self: torch.float32)
        run = quantize(mixtures.make("qwen3_moe"), recipe(tmp_path, bits=4, torch_compile=True, format=("fake",)))
    assert not run._numerics.compiler
    assert "experts are not compiled in torch.float32" in caplog.text


def test_an_ordinary_checkpoint_holds_experts_in_one_tensor(tmp_path: Path) -> None:
    run = tune(mixtures.STACKED, tmp_path)
    assert {GATE_UP, DOWN} <= set(run.plan.specs)
    assert not any("stacks of experts" in note for note in run.plan.notes)
    (folder,) = run.export()
    written = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for each, wanted in mixtures.replaced(mixtures.make(mixtures.STACKED), run).state_dict().items():
        assert torch.equal(written[each], wanted), each


def test_experts_in_one_tensor_stay_where_a_layout_has_no_place_for_them(tmp_path: Path) -> None:
    run = quantize(mixtures.make(mixtures.STACKED), recipe(tmp_path, bits=4, format=("llm_compressor", "fake")))
    wanted = "4 layers are kept: its checkpoints hold all experts in one tensor, for which llm_compressor has no place"
    assert wanted in run.plan.notes
    assert not {GATE_UP, DOWN} & set(run.plan.specs)
