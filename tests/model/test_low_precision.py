"""FP8 and MXFP4 checkpoints read as transformers dequantizes them, and quantize as models of 16 bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from autoround.engine import quantize
from autoround.errors import ModelError
from autoround.evaluate.opening import is_quantized
from autoround.hub import load
from autoround.model.load import open_model
from autoround.model.low_precision import dequantize_fp8, dequantize_mxfp4
from tests.engine import mixtures, small
from tests.engine.small import recipe
from tests.model import tiny

WEIGHTS = "model.safetensors"
FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_sizes = st.integers(1, 3)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16)


@settings(max_examples=60, deadline=None)
@given(rows=_sizes, columns=_sizes, seed=st.integers(0, 9), scale=st.sampled_from(["float32", "bfloat16", "uint8"]))
def test_fp8_is_what_transformers_makes_of_it(rows: int, columns: int, seed: int, scale: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(rows * 128, columns * 128, generator=generator).to(torch.float8_e4m3fn)
    scale_RC = torch.rand(rows, columns, generator=generator) * 0.1
    if scale == "uint8":
        scale_RC = torch.randint(110, 135, (rows, columns), generator=generator)
    scale_RC = scale_RC.to(getattr(torch, scale))
    theirs = Fp8Dequantize(None)._dequantize_one(weight_OI, scale_RC, torch.bfloat16)
    assert torch.equal(bits(dequantize_fp8(weight_OI, scale_RC)), bits(theirs))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), seed=st.integers(0, 9))
def test_blocks_at_the_ends_may_be_cut_off(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale_RC = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator)
    found = dequantize_fp8(weight_OI, scale_RC)
    row, column = rows - 1, columns - 1
    for at in ((0, 0), (row, column), (row // 2, column)):
        wanted = weight_OI[at].float() * scale_RC[at[0] // 128, at[1] // 128]
        assert found[at] == wanted.bfloat16()


@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 5)] * 3), seed=st.integers(0, 9))
def test_mxfp4_is_what_transformers_makes_of_it(shape: tuple[int, int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks_EOGH = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
    scales_EOG = torch.randint(100, 150, shape, generator=generator).to(torch.uint8)
    found, theirs = dequantize_mxfp4(blocks_EOGH, scales_EOG), convert_moe_packed_tensors(blocks_EOGH, scales_EOG)
    assert torch.equal(bits(found), bits(theirs))


def in_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every projection in FP8, as DeepSeek-V3 and Qwen 3 are published."""
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            found[name] = tensor
            continue
        blocks = [-(-size // 128) for size in tensor.shape]
        largest = torch.stack([torch.stack([part.abs().max() for part in rows.split(128, 1)])
                               for rows in tensor.float().split(128)])  # fmt: skip
        assert list(largest.shape) == blocks
        scale = (largest / 448).repeat_interleave(128, 0).repeat_interleave(128, 1)[: len(tensor), : tensor.shape[1]]
        found[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = largest / 448
    return found


def saved_in_fp8(folder: Path) -> Path:
    model = mixtures.make("deepseek_v3", hidden_size=256, intermediate_size=128, moe_intermediate_size=128).bfloat16()
    model.save_pretrained(folder)
    save_file(in_fp8(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})
    set_config(folder, FP8)
    return folder


def set_config(folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def same(folder: Path, theirs: dict[str, Tensor]) -> None:
    source = open_model(folder).source
    for name in source.names():
        assert source.shape(name) == tuple(theirs[name].shape), name
        assert source.dtype(name) == source.read(name).dtype, name
        assert torch.equal(source.read(name), theirs[name].to(source.dtype(name))), name
    assert not source.extra()


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_a_folder_in_fp8_reads_as_transformers_reads_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved_in_fp8(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    same(folder, loaded.state_dict())
    assert "left out" not in caplog.text
    assert not is_quantized(folder)


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_a_folder_in_fp8_is_quantized_and_its_scheme_forgotten(tmp_path: Path) -> None:
    made = recipe(tmp_path, "rtn", bits=4, group_size=32, format=("auto_round", "fake"))
    packed, fake = quantize(saved_in_fp8(tmp_path / "model"), made).export()
    assert json.loads((packed / "config.json").read_text())["quantization_config"]["quant_method"] == "auto-round"
    assert "quantization_config" not in json.loads((fake / "config.json").read_text())
    stored = load_file(fake / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} <= {torch.bfloat16, torch.float32}
    assert not any("scale" in name for name in stored)
    torch.testing.assert_close(small.logits(load(packed, dtype=torch.bfloat16)),
                               small.logits(load(fake, dtype=torch.bfloat16)), rtol=0.1, atol=0.1)  # fmt: skip


def test_a_folder_in_mxfp4_reads_as_transformers_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    mixtures.make("gpt_oss").bfloat16().save_pretrained(folder)
    stored, generator = load_file(folder / WEIGHTS), torch.Generator().manual_seed(0)
    for name in [
        each for each in stored if each.endswith("experts.gate_up_proj") or each.endswith("experts.down_proj")
    ]:
        experts, inputs, outputs = stored.pop(name).shape
        shape = experts, outputs, inputs // 32
        stored[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        stored[f"{name}_scales"] = torch.randint(115, 125, shape, generator=generator).to(torch.uint8)
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    set_config(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    same(folder, loaded.state_dict())
    (out,) = quantize(folder, recipe(tmp_path, "rtn", bits=4, group_size=32)).export()
    assert "model.layers.0.mlp.experts.3.down_proj.qweight" in load_file(out / WEIGHTS)


def test_scales_that_are_missing_or_do_not_fit_are_named(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    stored, key = in_fp8(load_file(tmp_path / WEIGHTS)), "model.layers.0.mlp.up_proj.weight"
    save_file(stored | {f"{key}_scale_inv": torch.ones(50, 50)}, tmp_path / WEIGHTS, {"format": "pt"})
    set_config(tmp_path, FP8)
    with pytest.raises(ModelError, match=rf"{key}: found \(50, 50\) scales for"):
        open_model(tmp_path).source.read(key)
    del stored[f"{key}_scale_inv"]
    save_file(stored, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"found {key} in FP8 without {key}_scale_inv; needed scales of blocks"):
        open_model(tmp_path)
