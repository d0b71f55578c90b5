"""Names, layouts and metadata of transformers models in GGUF files; their reader is transformers, not this package."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GgufConfig, GPT2Config, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from autoround.errors import UsageError
from autoround.formats.gguf.architectures import architecture, check, row_order, stored_float, tensor_names
from autoround.formats.gguf.container import StoredTensor, read_tensors
from autoround.formats.gguf.metadata import extra_tensors, metadata
from tests.formats.gguf_models import MODELS, VOCABULARY, make, write_model

# What transformers reads as GGUF files tell it.
SELF_CONTAINED = [
    "llama", "llama_tied", "llama_wide_heads", "mistral", "qwen2", "qwen2_tied", "qwen3", "gemma2", "gemma3",
    "qwen2_moe", "qwen3_moe"]  # fmt: skip
# What it reads of the tensors only: it takes no notice of these metadata.
WITH_CONFIG = ["llama_biased", "llama_linear", "llama_3", "qwen3_yarn", "phi3", "phi3_long", "phi3_partial"]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def logits(model: PreTrainedModel) -> Tensor:
    tokens_BT = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Tensor = model(tokens_BT).logits
    return found


def load(file: Path, **settings: Any) -> PreTrainedModel:
    dense = GgufConfig(dequantize=True)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=dense, **settings
    )
    return model.eval()


def values(stored: StoredTensor) -> Tensor:
    return stored.data.view(DTYPES[stored.type])


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_transformers_reads_the_same_model(name: str, tmp_path: Path) -> None:
    model = make(name)
    write_model(model, tmp_path / "a.gguf")
    assert torch.equal(logits(load(tmp_path / "a.gguf")), logits(model))


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_transformers_reads_the_same_tensors(name: str, tmp_path: Path) -> None:
    model = make(name)
    write_model(model, tmp_path / "a.gguf")
    assert torch.equal(logits(load(tmp_path / "a.gguf", config=model.config)), logits(model))


def test_half_precision_files(tmp_path: Path) -> None:
    model = make("gemma3")
    for dtype, kind in {torch.float16: "f16", torch.bfloat16: "bf16"}.items():
        write_model(model, tmp_path / "a.gguf", dtype)
        kinds = {tensor.type for tensor in read_tensors(tmp_path / "a.gguf").values() if len(tensor.shape) > 1}
        assert kinds == {kind}
        loaded = load(tmp_path / "a.gguf")
        for name, parameter in model.named_parameters():
            found = loaded.get_parameter(name)
            if parameter.ndim > 1:
                assert torch.equal(found, parameter.to(dtype).float())
            else:  # through a file that holds them plus one
                torch.testing.assert_close(found, parameter, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["smollm3", "mixtral", "llama_biased"])
def test_rows_of_queries_and_keys(name: str, tmp_path: Path) -> None:
    """Of a head of 8 rows, 0 to 3 and 4 to 7 take turns."""
    model = make(name)
    write_model(model, tmp_path / "a.gguf")
    stored = read_tensors(tmp_path / "a.gguf")
    turns = [0, 4, 1, 5, 2, 6, 3, 7]
    for kind, heads in {"q": 4, "k": 2}.items():
        order = [8 * head + row for head in range(heads) for row in turns]
        layer = model.get_submodule(f"model.layers.1.self_attn.{kind}_proj")
        assert torch.equal(values(stored[f"blk.1.attn_{kind}.weight"]), layer.get_parameter("weight")[order])
        if name == "llama_biased":
            assert torch.equal(values(stored[f"blk.1.attn_{kind}.bias"]), layer.get_parameter("bias")[order])
        found = row_order(model.config, f"model.layers.1.self_attn.{kind}_proj")
        assert found is not None and found.tolist() == order
    for kind in ("v", "o"):
        layer = model.get_submodule(f"model.layers.1.self_attn.{kind}_proj")
        stored_name = "blk.1.attn_v.weight" if kind == "v" else "blk.1.attn_output.weight"
        assert torch.equal(values(stored[stored_name]), layer.get_parameter("weight"))
        assert row_order(model.config, f"model.layers.1.self_attn.{kind}_proj") is None


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "gemma3", "phi3"])
def test_rows_stay_where_llama_cpp_rotates_halves(name: str) -> None:
    config = make(name).config
    assert [row_order(config, f"model.layers.0.self_attn.{kind}_proj") for kind in "qk"] == [None, None]


def test_experts_are_stacked(tmp_path: Path) -> None:
    model = make("mixtral")
    write_model(model, tmp_path / "a.gguf")
    stored = read_tensors(tmp_path / "a.gguf")
    experts = model.get_submodule("model.layers.1.mlp.experts")
    gate_up_ERD, down_EDF = experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj")
    assert torch.equal(values(stored["blk.1.ffn_gate_exps.weight"]), gate_up_ERD[:, :48])
    assert torch.equal(values(stored["blk.1.ffn_up_exps.weight"]), gate_up_ERD[:, 48:])
    assert torch.equal(values(stored["blk.1.ffn_down_exps.weight"]), down_EDF)
    assert stored["blk.1.ffn_gate_inp.weight"][:2] == ("f32", (4, 32))


def test_names() -> None:
    config = make("llama").config
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
        "model.layers.1.self_attn.o_proj.bias": "blk.1.attn_output.bias",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    assert {name: tensor_names(config, name) for name in names} == {name: (to,) for name, to in names.items()}
    norms = {
        "model.layers.0.post_attention_layernorm.weight": "blk.0.post_attention_norm.weight",
        "model.layers.0.pre_feedforward_layernorm.weight": "blk.0.ffn_norm.weight",
        "model.layers.0.post_feedforward_layernorm.weight": "blk.0.post_ffw_norm.weight",
    }
    gemma = make("gemma3").config
    assert {name: tensor_names(gemma, name) for name in norms} == {name: (to,) for name, to in norms.items()}
    assert tensor_names(gemma, "lm_head.weight") == ()
    fused = tensor_names(make("qwen2_moe").config, "model.layers.0.mlp.experts.gate_up_proj")
    assert fused == ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight")


def test_a_tensor_without_a_place() -> None:
    with pytest.raises(UsageError, match="model.layers.9.*qwen2 do not have"):
        tensor_names(make("qwen2").config, "model.layers.9.self_attn.q_proj.weight")


@pytest.mark.parametrize("name", ["gemma2", "qwen2_moe", "llama_biased"])
def test_shapes_are_known_without_values(name: str) -> None:
    model = make(name)
    for key, parameter in model.named_parameters():
        value = parameter.detach().bfloat16()
        shapes = [(part.shape, part.dtype) for part in stored_float(model.config, key, value.to("meta"))]
        assert shapes == [(part.shape, part.dtype) for part in stored_float(model.config, key, value)]


def test_norms_of_gemma_are_stored_plus_one() -> None:
    """In float32, where bfloat16 would lose digits."""
    config = make("gemma2").config
    weight = torch.tensor([0.0, -0.5, 0.0078125], dtype=torch.bfloat16)
    (stored,) = stored_float(config, "model.norm.weight", weight)
    assert stored.tolist() == [1.0, 0.5, 1.0078125] and stored.dtype == torch.float32
    (plain,) = stored_float(make("qwen3").config, "model.norm.weight", weight)
    assert plain.tolist() == [0.0, -0.5, 0.0078125] and plain.dtype == torch.float32


def test_factors_of_llama_3() -> None:
    """By them llama.cpp divides the frequencies that transformers has instead."""
    config = make("llama_3", head_dim=64).config
    scaled_H, attention = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    base_H = config.rope_parameters["rope_theta"] ** -(torch.arange(0, 64, 2) / 64)
    (factors_H,) = extra_tensors(config).values()
    assert attention == 1.0 and set(extra_tensors(config)) == {"rope_freqs.weight"}
    assert factors_H.dtype == torch.float32 and factors_H.min() == 1 and factors_H.max() == 8
    torch.testing.assert_close(base_H / factors_H, scaled_H)


def test_factors_of_long_contexts() -> None:
    config = make("phi3_long").config
    found = {name: factors.tolist() for name, factors in extra_tensors(config).items()}
    long, short = torch.tensor([1.0, 1.5, 2.5, 3.5]).tolist(), torch.tensor([1.0, 1.1, 1.2, 1.3]).tolist()
    assert found == {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    assert metadata(config, "tiny")["phi3.rope.scaling.attn_factor"] == pytest.approx(attention)
    assert extra_tensors(make("phi3").config) == {}


def test_metadata_of_llama() -> None:
    assert metadata(make("llama").config, "Tiny") == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Tiny",
        "llama.vocab_size": 48,
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
    }


# Name -> what is in its metadata beside sizes.
SPECIAL: dict[str, dict[str, Any]] = {
    "llama_linear": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    "qwen3_yarn": {
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 32,
        "qwen3.rope.scaling.yarn_beta_fast": 32.0,
        "qwen3.rope.scaling.yarn_beta_slow": 1.0,
    },
    "gemma2": {
        "gemma2.attention.sliding_window": 6,
        "gemma2.attn_logit_softcapping": 50.0,
        "gemma2.final_logit_softcapping": 30.0,
    },
    "gemma3": {
        "gemma3.attention.key_length": 256,
        "gemma3.attention.sliding_window": 6,
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.freq_base_swa": 1e4,
    },
    "phi3": {"phi3.attention.sliding_window": 0},
    "phi3_partial": {"phi3.rope.dimension_count": 4},
    "mixtral": {"llama.expert_count": 4, "llama.expert_used_count": 2},
    "qwen2_moe": {
        "qwen2moe.expert_count": 4,
        "qwen2moe.expert_used_count": 2,
        "qwen2moe.expert_feed_forward_length": 1408,
        "qwen2moe.expert_shared_feed_forward_length": 5632,
    },
}


@pytest.mark.parametrize("name", SPECIAL)
def test_metadata(name: str) -> None:
    found = metadata(make(name).config, "tiny")
    assert {key: found.get(key) for key in SPECIAL[name]} == SPECIAL[name]
    assert {type(found[key]) for key in SPECIAL[name]} == {type(value) for value in SPECIAL[name].values()}


def test_other_model_types() -> None:
    with pytest.raises(UsageError, match="found model type gpt2; needed one of gemma2, .*smollm3; use another format"):
        check(GPT2Config())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act: found gelu; needed silu"),
        ("qwen3", {"attention_bias": True}, "attention_bias: found True; needed False"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob: found True"),
        ("qwen2_moe", {"tie_word_embeddings": True}, "tie_word_embeddings: found True"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob: found False"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers: found \\[0\\]; needed None or \\[\\]"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings: found False"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping: found none; needed a number"),
        ("gemma3", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar: found 8; needed 256"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "layer_types: found"),
        ("smollm3", {"no_rope_layers": [1] * 5}, "no_rope_layers: found"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type"),
        ("qwen2", MODELS["llama_3"][1], "rope_type: found llama3; needed default or linear or yarn"),
        (
            "qwen3",
            {"rope_parameters": MODELS["qwen3_yarn"][1]["rope_parameters"] | {"attention_factor": 2.0}},
            "attention_factor: found 2.0; needed None",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor: found 0.5",
        ),
    ],
)
def test_settings_that_llama_cpp_cannot_be_told(name: str, settings: dict[str, Any], message: str) -> None:
    model_type, own = MODELS[name]
    base = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "tie_word_embeddings": False}
    config = CONFIG_MAPPING[model_type](**base | own | settings)
    with pytest.raises(UsageError, match=message):
        check(config)


@pytest.mark.parametrize(("name", "scale"), [("gemma2", 46), ("gemma3", 62)])
def test_the_scale_of_the_largest_gemmas(name: str, scale: int) -> None:
    """They scale attention by the hidden size per head, here 8."""
    config = make(name, num_hidden_layers=1).config
    config.num_hidden_layers, config.query_pre_attn_scalar = scale, 8
    period = architecture(config.model_type).window_period
    config.layer_types = [f"{'sliding' if layer % period else 'full'}_attention" for layer in range(1, scale + 1)]
    check(config)
    config.query_pre_attn_scalar = 256
    with pytest.raises(UsageError, match="needed 8"):
        check(config)


def test_a_sliding_window_that_llama_cpp_has_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="autoround"):
        metadata(make("mistral").config, "tiny")
        assert caplog.messages == []
        metadata(make("mistral", sliding_window=16).config, "tiny")
    assert caplog.messages == [
        "mistral: llama.cpp has no sliding window for it; contexts beyond 16 tokens differ from transformers"
    ]
