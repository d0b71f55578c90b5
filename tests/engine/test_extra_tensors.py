"""Heads for more tokens, and other modules that transformers' class leaves out: every folder gets them unchanged and
says that they are not quantized."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoround.engine import Run, quantize
from autoround.export import Target, export_checkpoint, export_journal
from autoround.formats.gguf.container import read_tensors
from autoround.hub import load
from tests.engine import mixtures, small
from tests.engine.small import recipe
from tests.engine.test_gguf_run import WIDE, gguf_recipe
from tests.formats import gguf_models
from tests.formats.gguf_tokenizers import sentencepiece

# As DeepSeek-V3 and Qwen3-Next store theirs: one more layer than the model has, and modules beside it.
EXTRA = {
    "model.layers.2.eh_proj.weight": torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "model.layers.2.mlp.experts.0.gate_proj.weight": torch.full((32, 64), 0.3).bfloat16(),
    "mtp.fc.weight": torch.full((64, 128), 1e6),  # beyond float16
    "mtp.norm.count": torch.arange(4),
}
NOTE = "4 tensors that {} does not have, such as model.layers.2.eh_proj.weight, {}"


def saved(name: str, folder: Path) -> Path:
    """A checkpoint with tensors that the model does not have."""
    model = small.make(name) if name in small.CONFIGS else mixtures.make(name)
    model.save_pretrained(folder)
    save_file(load_file(folder / "model.safetensors") | EXTRA, folder / "model.safetensors", {"format": "pt"})
    return folder


def planned(name: str, folder: Path, *formats: str) -> Run:
    return quantize(saved(name, folder / "model"), recipe(folder, "rtn", bits=4, group_size=32, format=formats))


def check(folder: Path) -> None:
    stored: dict[str, Tensor] = load_file(folder / "model.safetensors")
    for name, tensor in EXTRA.items():
        assert stored[name].dtype == tensor.dtype, name
        assert torch.equal(stored[name], tensor), name


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_every_folder_has_them(name: str, tmp_path: Path) -> None:
    formats = ("auto_round", "auto_gptq", "auto_awq", "llm_compressor", "fake")
    run = planned(name, tmp_path, *formats)
    assert NOTE.format(run.plan.architecture, "are copied unchanged") in run.plan.notes
    for folder in run.export():
        check(folder)
    load(tmp_path / "out" / "auto_round")


def test_configurations_keep_loaders_from_taking_them_for_quantized(tmp_path: Path) -> None:
    formats = ("auto_round", "auto_gptq", "auto_awq", "llm_compressor")
    folders = planned("llama", tmp_path, *formats).export()
    found = {
        form: json.loads((folder / "config.json").read_text())["quantization_config"]
        for form, folder in zip(formats, folders, strict=True)
    }
    patterns = {
        "auto_round": [key for key, own in found["auto_round"]["extra_config"].items() if own["bits"] == 16],
        "auto_gptq": [key.removeprefix("-:") for key in found["auto_gptq"]["dynamic"]],
        "auto_awq": [key.removeprefix("-:") for key in found["auto_awq"]["dynamic"]],
        "llm_compressor": [key.removeprefix("re:") for key in found["llm_compressor"]["ignore"] if "re:" in key],
    }
    for form, own in patterns.items():
        for wanted in ("model.layers.2", "model.layers.2.self_attn.q_proj", "mtp.layers.0.mlp.experts"):
            assert any(re.match(pattern, wanted) for pattern in own), (form, wanted)
        for quantized in ("model.layers.1.self_attn.q_proj", "model.layers.20.mlp.up_proj"):
            assert not any(re.match(pattern, quantized) for pattern in own), (form, quantized)
    assert {"model.layers.2", "mtp"} <= set(found["auto_awq"]["modules_to_not_convert"])


def test_they_follow_from_folder_to_folder_and_from_the_journal(tmp_path: Path) -> None:
    (folder,) = planned("llama", tmp_path, "auto_round").export()
    export_checkpoint(folder, Target(folder=tmp_path / "again", formats=("auto_gptq",)))
    check(tmp_path / "again")
    export_journal(tmp_path / "out.journal", Target(folder=tmp_path / "late", formats=("fake",)))
    check(tmp_path / "late")


def test_a_gguf_file_has_no_place_for_them(tmp_path: Path) -> None:
    gguf_models.make("llama", **WIDE).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file(load_file(file) | EXTRA, file, {"format": "pt"})
    run = quantize(tmp_path / "model", gguf_recipe(tmp_path, "gguf:q8_0", iters=0), tokenizer=sentencepiece())
    assert NOTE.format("LlamaForCausalLM", "have no place in a GGUF file") in run.plan.notes
    (folder,) = run.export()
    (written,) = folder.iterdir()
    assert not any("mtp" in name or "blk.2" in name for name in read_tensors(written))
