"""Runs that write GGUF files: plans, resumed runs, late exports, and formats of several grids in one command."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from autoround import func
from autoround.engine import Run, quantize, quantize_each
from autoround.errors import FormatError, ModelError, UsageError
from autoround.export import Target, export_journal
from autoround.families import split
from autoround.forecast.foretell import foretell
from autoround.formats.gguf.container import read_tensors
from autoround.journal import Journal, read_manifest
from autoround.recipe import Recipe
from tests.engine.small import recipe, rows
from tests.formats.gguf_models import make
from tests.formats.gguf_tokenizers import sentencepiece
from tests.formats.test_gguf_architectures import load

WIDE: dict[str, Any] = {"vocab_size": 640, "hidden_size": 256, "intermediate_size": 512}


def gguf_recipe(folder: Path, *formats: str, **settings: Any) -> Recipe:
    """Six steps with a clip search."""
    own: dict[str, Any] = {"dataset": rows(), "format": formats or ("gguf:q4_k_m",), "bits": None, "group_size": None}
    return recipe(folder, **{**own, "clip_search": None, "lr": 0.01, **settings})


def run(folder: Path, *formats: str, **settings: Any) -> Run:
    return quantize(make("llama", **WIDE), gguf_recipe(folder, *formats, **settings), tokenizer=sentencepiece())


@pytest.mark.parametrize("iters", [0, 6])
def test_the_file_holds_the_codes_of_the_journal(iters: int, tmp_path: Path) -> None:
    done = run(tmp_path, iters=iters)
    (folder,) = done.export()
    (file,) = folder.iterdir()
    assert file.name == "LlamaForCausalLM-Q4_K_M.gguf"
    read = load(file).state_dict()
    journal = Journal(done.journal_folder, read_manifest(done.journal_folder))
    for index, part in enumerate(done.plan.parts):
        for name, codes in journal.read_block(index).items():
            wanted = func.dequantize(codes, part.specs[name])
            assert torch.equal(read[f"{part.prefix}{name}.weight"], wanted)
    assert {str(spec) for spec in done.plan.specs.values()} == {"Q4_K", "Q6_K"}


def test_tuning_lowers_the_loss_that_the_search_leaves(tmp_path: Path) -> None:
    events = list(run(tmp_path, "gguf:q2_k_s", iters=40))
    assert events[0].loss_best < 0.9 * events[0].loss_first


def test_a_tied_embedding_is_searched_with_the_inputs_of_the_head(tmp_path: Path) -> None:
    model = make("llama_tied", **WIDE)
    codes = {}
    for name, search in (("searched", None), ("plain", False)):
        done = quantize(model, gguf_recipe(tmp_path / name, iters=0, clip_search=search), tokenizer=sentencepiece())
        done.export()
        journal = Journal(done.journal_folder, read_manifest(done.journal_folder))
        codes[name] = journal.read_block(len(done.plan.blocks))["model.embed_tokens"]
        assert str(done.plan.specs["model.embed_tokens"]) == "Q6_K"
    assert not torch.equal(codes["searched"].d_OK, codes["plain"].d_OK)


def test_a_tied_weight_that_is_stored_under_the_head_alone(tmp_path: Path) -> None:
    model = make("llama_tied", **WIDE)
    model.save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    folders = [quantize(source, gguf_recipe(tmp_path / name, iters=0), tokenizer=sentencepiece()).export()[0]
               for name, source in (("renamed", tmp_path / "source"), ("usual", model))]  # fmt: skip
    renamed, usual = (next(folder.glob("*.gguf")) for folder in folders)
    found, wanted = (load(file).state_dict() for file in (renamed, usual))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_files_from_a_journal_later(tmp_path: Path) -> None:
    done = run(tmp_path)
    (first,) = done.export()
    target = Target(folder=tmp_path / "later", formats=("gguf:q4_k_m",))
    model, words = make("llama", **WIDE), sentencepiece()
    (second,) = export_journal(done.journal_folder, target, model=model, tokenizer=words)
    contents = [next(folder.iterdir()).read_bytes() for folder in (first, second)]
    assert contents[0] == contents[1]
    (dense,) = export_journal(
        done.journal_folder, replace(target, folder=tmp_path / "dense", formats=("fake",)), model=model, tokenizer=words
    )
    assert (dense / "model.safetensors").exists()
    misfits = {
        "auto_gptq": "format auto_gptq: found codes of GGUF grids; needed integer ones",
        "gguf:q6_k": "format gguf:q6_k: .*q_proj: found q4_k codes; needed q6_k",
    }
    for name, message in misfits.items():
        with pytest.raises(UsageError, match=message):
            export_journal(
                done.journal_folder,
                replace(target, folder=tmp_path / "no", formats=(name,)),
                model=model,
                tokenizer=words,
            )


def test_a_float_file_needs_no_data(tmp_path: Path) -> None:
    done = run(tmp_path, "gguf:bf16", dataset="nowhere.txt")
    (folder,) = done.export()
    (file,) = folder.iterdir()
    assert read_tensors(file)["blk.0.attn_q.weight"].type == "bf16"
    target = Target(folder=tmp_path / "later", formats=("gguf:f16",))
    model, words = make("llama", **WIDE), sentencepiece()
    (later,) = export_journal(done.journal_folder, target, model=model, tokenizer=words)
    assert read_tensors(next(later.iterdir()))["blk.0.attn_q.weight"].type == "f16"
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    (forecast,) = foretell(replace(gguf_recipe(tmp_path, "gguf:f16"), model=str(tmp_path / "model")))
    assert forecast.seconds is not None


def test_codes_of_experts_are_written_as_floats_too(tmp_path: Path) -> None:
    done = quantize(
        make("qwen3_moe", vocab_size=640),
        gguf_recipe(tmp_path, "gguf:q4_0", "fake", iters=0),
        tokenizer=sentencepiece(),
    )
    packed, floats = done.export()
    (file,) = packed.iterdir()
    wanted, found = load(file).state_dict(), AutoModelForCausalLM.from_pretrained(floats).state_dict()
    experts = [name for name in wanted if "experts" in name]
    assert experts
    assert all(torch.equal(wanted[name], found[name].to(wanted[name].dtype)) for name in experts)


def test_formats_of_several_grids_have_a_run_each(tmp_path: Path) -> None:
    settings = gguf_recipe(
        tmp_path, "auto_round", "gguf:q4_0", "auto_gptq", "gguf:q8_0", bits=4, group_size=32, iters=2
    )
    model, words = make("llama", **WIDE), sentencepiece()
    with pytest.raises(UsageError, match="need 3 grids; needed formats of one; use quantize_each"):
        quantize(model, settings, tokenizer=words)
    runs = quantize_each(model, settings, tokenizer=words)
    folders = [folder.relative_to(tmp_path) for each in runs for folder in each.export()]
    assert list(map(str, folders)) == ["out/auto_round", "out/auto_gptq", "out/gguf_q4_0", "out/gguf_q8_0"]
    again = quantize_each(model, settings, tokenizer=words)
    assert all(event.resumed for each in again for event in each)


def test_splitting() -> None:
    def families(*formats: str, **settings: Any) -> list[tuple[tuple[str, ...], str]]:
        return [(each.format, each.output_dir) for each in split(Recipe(format=formats, output_dir="o", **settings))]

    assert families("auto_round", "fake") == [(("auto_round", "fake"), "o")]
    assert families("fake", "GGUF:Q6_K") == [(("gguf:q6_k", "fake"), "o")]
    assert families("auto_round", "gguf:q6_k", bits=3) == [
        (("auto_round",), "o/auto_round"),
        (("gguf:q6_k",), "o/gguf_q6_k"),
    ]
    with pytest.raises(UsageError, match="format gguf:q6_k: found --scheme; needed none: the file type"):
        split(Recipe(format=("gguf:q6_k",), scheme="W2A16"))
    assert [each.bits for each in split(Recipe(format=("auto_round", "gguf:q6_k"), bits=3))] == [3, None]
    with pytest.raises(UsageError, match="format gguf:q6_k: found --bits; needed none"):
        split(Recipe(format=("gguf:q6_k",), bits=4))
    with pytest.raises(UsageError, match="format gguf:q6_k: found --quant_lm_head; needed none"):
        split(Recipe(format=("gguf:q6_k",), quant_lm_head=True))


def test_a_tokenizer_that_the_file_cannot_hold_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="found the token id 602; needed ids below 512"):
        quantize(make("llama", **WIDE | {"vocab_size": 512}), gguf_recipe(tmp_path), tokenizer=sentencepiece())
    with pytest.raises(ModelError, match="found no tokenizer with a model in memory"):
        quantize(make("llama", **WIDE), gguf_recipe(tmp_path))
    assert not (tmp_path / "out.journal").exists()


def test_unknown_architectures_are_refused(tmp_path: Path) -> None:
    from tests.engine.small import make as make_small

    with pytest.raises(UsageError, match="found model type gpt2; needed one of gemma2, .*; use another format"):
        quantize(make_small("gpt2"), gguf_recipe(tmp_path), tokenizer=sentencepiece())
