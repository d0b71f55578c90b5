"""Runs that quantize the output head, and runs with settings of single layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoround import func
from autoround.engine import quantize
from autoround.errors import JournalError, UsageError
from autoround.export import Target, export_checkpoint, export_journal
from autoround.formats.packed import PackedLinear
from autoround.func import init
from autoround.hub import load
from autoround.journal import MANIFEST, Journal
from tests.engine.small import codes, hashes, logits, make, nearest, recipe, replaced, stopped, tune

EMBEDDING = {"llama_tied": "model.embed_tokens", "gpt2": "transformer.wte"}


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("preset", ["rtn", "opt_rtn"])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_the_head_is_the_last_part_of_a_run(name: str, preset: str, tmp_path: Path) -> None:
    run = quantize(make(name), recipe(tmp_path, preset, bits=4, quant_lm_head=True, format=("auto_round", "fake")))
    assert [done.path for done in run][-1] == "lm_head"
    assert list(Journal(run.journal_folder, {}).read_block(2)) == ["lm_head"]
    packed, dense = run.export()
    expected = logits(replaced(name, run))
    for folder in (packed, dense):
        model = load(folder, dtype="float32")
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        assert settings_of(folder).get("tie_word_embeddings", False) is False
        assert isinstance(model.get_submodule("lm_head"), PackedLinear) == (folder == packed)
    own = {"bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
    assert settings_of(packed)["quantization_config"]["extra_config"] == {"lm_head": own}
    tensors = load_file(packed / "model.safetensors")
    assert {key for key in tensors if key.startswith("lm_head")} == {
        f"lm_head.{x}" for x in ("qweight", "qzeros", "scales")
    }
    if name in EMBEDDING:
        key = f"{EMBEDDING[name]}.weight"
        assert torch.equal(tensors[key], make(name).get_parameter(key))
        assert load_file(dense / "model.safetensors").keys() >= {key, "lm_head.weight"}


@pytest.mark.parametrize("stored", ["model.embed_tokens", "lm_head", "both"])
def test_a_tied_head_is_untied_whatever_name_the_checkpoint_has_for_it(stored: str, tmp_path: Path) -> None:
    source, names = tmp_path / "source", ("model.embed_tokens", "lm_head")
    make("llama_tied").save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    shared = tensors.pop("model.embed_tokens.weight")
    tensors |= {f"{name}.weight": shared.clone() for name in names if stored in (name, "both")}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    run = tune(source, tmp_path, "rtn", bits=4, quant_lm_head=True)
    (folder,) = run.export()
    assert torch.equal(load_file(folder / "model.safetensors")["model.embed_tokens.weight"], shared)
    torch.testing.assert_close(logits(load(folder)), logits(replaced("llama_tied", run)), rtol=1e-4, atol=1e-4)


def test_without_data_the_head_is_rounded_to_nearest(tmp_path: Path) -> None:
    model = make("llama_tied")
    run = tune(model, tmp_path, "rtn", quant_lm_head=True)
    own, plain = codes(run)["lm_head"], nearest(model, run)["lm_head"]
    assert all(torch.equal(one, other) for one, other in zip(own, plain, strict=True))


def test_with_data_its_clips_are_searched_on_its_inputs_in_the_quantized_model(tmp_path: Path) -> None:
    run = tune(make(), tmp_path, "opt_rtn", dtype="float32", quant_lm_head=True)
    model, seen = replaced("llama", run), []
    model.get_submodule("lm_head").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model)
    moment_I, weight_OI = seen[0].square().mean((0, 1)), make().get_parameter("lm_head.weight").detach()
    spec = run.plan.specs["lm_head"]
    found, expected, unweighted = (
        codes(run)["lm_head"],
        *(func.quantize(prepared, init.search_clips(prepared, moment, spec), spec)
          for prepared in [func.prepare(weight_OI, spec)] for moment in (moment_I, None)),
    )  # fmt: skip
    assert (found.scale_OG == expected.scale_OG).float().mean() > 0.99
    assert (found.scale_OG == unweighted.scale_OG).float().mean() < 0.9


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_goes_on_to_the_same_head(after: int, tmp_path: Path) -> None:
    """Also where all blocks were finished and only the head is left."""
    model, own = make("llama_tied"), {"quant_lm_head": True, "clip_search": True, "layer_config": {"down": {"bits": 8}}}
    whole = tune(model, tmp_path / "whole", **own)
    stopped(model, recipe(tmp_path / "cut", **own), after=after)
    run = quantize(model, recipe(tmp_path / "cut", **own))
    assert [done.resumed for done in run] == [index < after for index in range(3)]
    assert hashes(run.export()[0]) == hashes(whole.export()[0])
    assert not (run.journal_folder / "activations").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"quant_lm_head": False}, r"plan\.lm_head: was .*, now None"),
        ({"layer_config": {"down": {"bits": 3}}}, r"plan\.model\.layers\.0\.mlp\.down_proj\.bits: was 8, now 3"),
        ({"layer_config": {}}, r"plan\.model\.layers\.0\.mlp\.down_proj\.bits: was 8, now 2"),
        ({"ignore_layers": "k_proj"}, r"plan\.model\.layers\.0\.self_attn\.k_proj: was .*, now None"),
    ],
)
def test_a_journal_of_other_settings_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    own: dict[str, Any] = {"quant_lm_head": True, "layer_config": {"down": {"bits": 8}}}
    stopped(make(), recipe(tmp_path, "rtn", **own), after=1)
    with pytest.raises(JournalError, match=message):
        list(quantize(make(), recipe(tmp_path, "rtn", **own | changed)))
    same = {"layer_config": "{down_proj: {bits: 8}}", "ignore_layers": "embed_tokens,norm"}
    with pytest.raises(UsageError, match="ignore_layers: found 'embed_tokens', which names no layer"):
        quantize(make(), recipe(tmp_path, "rtn", **own | same))
    done = list(quantize(make(), recipe(tmp_path, "rtn", **own | same | {"ignore_layers": ()})))
    assert done[0].resumed  # other words for the same plan


def test_export_from_the_journal(tmp_path: Path) -> None:
    make("llama_tied").save_pretrained(tmp_path / "source")
    own = {"bits": 4, "quant_lm_head": True, "layer_config": "{down_proj: W8A16G32, lm_head: {bits: 8}}"}
    run = tune(tmp_path / "source", tmp_path, "rtn", format=("auto_round", "fake"), **own)
    late = export_journal(run.journal_folder, Target(folder=tmp_path / "late", formats=("auto_round", "fake")))
    for one, two in zip(run.export(), late, strict=True):
        assert hashes(one) == hashes(two)
    with pytest.raises(UsageError, match="format auto_gptq: lm_head: found a quantized output head"):
        export_journal(run.journal_folder, Target(folder=tmp_path / "gptq", formats=("auto_gptq",)))
    (tmp_path / "out.journal" / "blocks" / "00002.safetensors").unlink()
    with pytest.raises(JournalError, match="found 2 of 3 blocks; needed all"):
        export_journal(run.journal_folder, Target(folder=tmp_path / "again", formats=("fake",)))


def test_a_checkpoint_with_a_head_in_another_layout(tmp_path: Path) -> None:
    run = tune(make("llama_tied"), tmp_path, "rtn", bits=4, sym=False, quant_lm_head=True)
    (source,) = run.export()
    target = Target(folder=tmp_path / "more", formats=("auto_round:gptqmodel", "fake"))
    expected = logits(load(source, dtype="float32"))
    for folder in export_checkpoint(source, target):
        precision = 0.05 if folder.name == "fake" else 1e-5  # its weights are rounded to float16
        torch.testing.assert_close(logits(load(folder, dtype="float32")), expected, rtol=0, atol=precision)
        assert settings_of(folder)["tie_word_embeddings"] is False
    with pytest.raises(UsageError, match="format gptq_v2: lm_head: found a quantized output head"):
        export_checkpoint(source, Target(folder=tmp_path / "no", formats=("gptq_v2",)))


@pytest.mark.parametrize("form", ["auto_gptq", "gptq_v2", "auto_awq", "llm_compressor"])
def test_formats_without_a_head_are_refused_before_anything_is_opened(form: str, tmp_path: Path) -> None:
    made = recipe(tmp_path, "rtn", bits=4, format=("auto_round", form), quant_lm_head=True)
    with pytest.raises(UsageError, match=f"format {form}: found --quant_lm_head; needed off; use auto_round"):
        quantize(tmp_path / "model that is never opened", made)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preset", ["default", "rtn"])
def test_a_run_with_mixed_settings_writes_them_in_every_format(preset: str, tmp_path: Path) -> None:
    config = {"k_proj": {"bits": 8}, "layers.1.mlp": {"group_size": 16, "sym": False}, "o_proj": "keep"}
    formats = ("auto_round", "gptq_v2", "llm_compressor", "fake")
    run = tune(make(), tmp_path, preset, bits=4, format=formats, layer_config=config)
    assert (
        json.loads((run.journal_folder / MANIFEST).read_text())["plan"]["model.layers.0.self_attn.k_proj"]["bits"] == 8
    )
    for folder in run.export():
        kept = torch.float16 if folder.name == "gptq_v2" else torch.float32
        expected = logits(replaced("llama", run, kept=kept))
        torch.testing.assert_close(logits(load(folder, dtype="float32")), expected, rtol=1e-4, atol=1e-4)
