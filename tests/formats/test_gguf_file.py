"""Whole GGUF files of plans and codes: the reader of transformers finds the weights that the codes stand for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from autoround import func
from autoround.errors import FormatError
from autoround.formats.gguf.container import read_tensors
from autoround.formats.gguf.file import GgufFile
from autoround.formats.gguf.plan import plan_file
from autoround.formats.gguf.recipes import FILE_TYPES
from autoround.func import Codes, GgufSpec
from autoround.model.blocks import embedding, structure
from autoround.model.finish import read_weight
from autoround.model.load import open_model
from tests.formats.gguf_models import make
from tests.formats.gguf_tokenizers import sentencepiece
from tests.formats.test_gguf_architectures import load

WIDE: dict[str, Any] = {"vocab_size": 640, "hidden_size": 256, "intermediate_size": 512}


def planned(model: PreTrainedModel | Path, file_type: str, tokenizer: Any = None) -> GgufFile:
    """A file of codes rounded to nearest."""
    opened = open_model(model, tokenizer=tokenizer)
    shapes = {name: opened.source.shape(name) for name in opened.source.names()}
    plan = plan_file(file_type, structure(opened.skeleton), embedding(opened.skeleton), opened.config, shapes)

    def codes(index: int) -> dict[str, Codes]:
        part = plan.parts[index]
        weights = {name: read_weight(opened, f"{part.prefix}{name}") for name in part.specs}
        prepared = {name: func.prepare(weight, part.specs[name]) for name, weight in weights.items()}
        return {name: func.quantize(own, func.nearest(own), part.specs[name]) for name, own in prepared.items()}

    return GgufFile(file_type=file_type, model=opened, plan=plan, codes=codes)


def expected(file: GgufFile) -> dict[str, torch.Tensor]:
    """The model's tensors with its layers dequantized from their codes."""
    source = file.model.source
    tensors = {name: source.read(name) for name in source.names()}
    for index, part in enumerate(file.plan.parts):
        for name, codes in file.codes(index).items():
            tensors[f"{part.prefix}{name}.weight"] = func.dequantize(codes, part.specs[name])
    return tensors


@pytest.mark.parametrize("file_type", [name for name in FILE_TYPES if "f16" not in name])
def test_transformers_reads_what_the_codes_stand_for(file_type: str, tmp_path: Path) -> None:
    file = planned(make("llama", **WIDE), file_type, sentencepiece())
    file.write(tmp_path / file.name)
    file.verify(tmp_path / file.name)
    read = load(tmp_path / file.name).state_dict()
    for name, wanted in expected(file).items():
        assert torch.equal(read[name], wanted), name
    assert file.name == f"LlamaForCausalLM-{file_type.upper()}.gguf"


@pytest.mark.parametrize("name", ["llama_tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_architectures(name: str, tmp_path: Path) -> None:
    file = planned(make(name, **WIDE), "q4_k_m", sentencepiece())
    file.write(tmp_path / "a.gguf")
    file.verify(tmp_path / "a.gguf")
    read = load(tmp_path / "a.gguf").state_dict()
    for key, wanted in expected(file).items():
        # gemma's norms are stored with 1 added
        torch.testing.assert_close(read[key], wanted, rtol=0, atol=1e-7 if key.endswith("norm.weight") else 0)


@pytest.mark.parametrize("file_type", ["f16", "bf16"])
def test_files_without_codes(file_type: str, tmp_path: Path) -> None:
    file = planned(make("qwen2", **WIDE), file_type, sentencepiece())
    assert file.plan.parts == ()
    file.write(tmp_path / "a.gguf")
    file.verify(tmp_path / "a.gguf")
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[file_type]
    read = load(tmp_path / "a.gguf").state_dict()
    for key, wanted in expected(file).items():
        assert torch.equal(read[key], wanted.to(dtype).float() if wanted.ndim == 2 else wanted), key


def test_pieces_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = planned(make("llama", **WIDE), "q4_k_m", sentencepiece())
    file.write(tmp_path / "whole.gguf")
    monkeypatch.setattr("autoround.formats.contents.PIECE", 1000)
    monkeypatch.setattr("autoround.formats.gguf.file.PIECE", 1000)
    file.write(tmp_path / "pieces.gguf")
    assert (tmp_path / "pieces.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    file.verify(tmp_path / "whole.gguf")


def test_rows_without_whole_blocks_take_other_types(tmp_path: Path) -> None:
    file = planned(make("llama", vocab_size=640, hidden_size=64, intermediate_size=144), "q4_k_m", sentencepiece())
    layer = "model.layers.0.mlp"
    assert file.plan.specs[f"{layer}.up_proj"] == GgufSpec(type="q5_0")
    assert file.plan.layers[f"{layer}.down_proj"].spec is None
    assert file.plan.layers[f"{layer}.down_proj"].reason == "stored as f16: 144 columns are no multiple of 32"
    file.write(tmp_path / "a.gguf")
    stored = read_tensors(tmp_path / "a.gguf")
    assert [stored[f"blk.0.{name}.weight"].type for name in ("ffn_up", "ffn_down")] == ["q5_0", "f16"]


def test_a_gguf_source_keeps_its_metadata_and_tokenizer(tmp_path: Path) -> None:
    first = planned(make("llama", **WIDE), "f16", sentencepiece())
    first.write(tmp_path / "one.F16.gguf")
    second = planned(tmp_path / "one.F16.gguf", "q6_k")
    assert second.name == "one.F16-Q6_K.gguf"
    before, after = first.metadata(), second.metadata()
    assert set(before) == set(after)
    second.write(tmp_path / "two.gguf")
    second.verify(tmp_path / "two.gguf")
    read = load(tmp_path / "two.gguf").state_dict()
    for key, wanted in expected(second).items():
        assert torch.equal(read[key], wanted), key


def test_what_was_not_written_is_found(tmp_path: Path) -> None:
    file, path = planned(make("llama", **WIDE), "q4_0", sentencepiece()), tmp_path / "a.gguf"
    file.write(path)
    place = path.stat().st_size - 5000
    with path.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte[0] ^ 16]))
    with pytest.raises(FormatError, match=r"output.weight: q_OI: found other values"):
        file.verify(path)
