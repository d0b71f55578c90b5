"""Layers that no packed layer can replace, shared weights, and buffers that are not saved."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPTJConfig,
    JambaConfig,
    JetMoeConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from autoround.model.blocks import find_blocks, structure
from autoround.model.buffers import refill
from autoround.model.reads import read_directly

_SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}


def _model(config: object) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def _llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**_SMALL, intermediate_size=32, num_attention_heads=2)).eval()


def test_weights_that_a_mixer_multiplies_by_itself_are_found() -> None:
    mamba = _model(MambaConfig(**_SMALL, time_step_rank=4))
    assert read_directly(mamba) == {"lm_head", *(f"backbone.layers.{index}.mixer.dt_proj" for index in (0, 1))}
    fates = {layer.path: layer.fixed for block in structure(mamba).blocks for layer in block.layers}
    assert fates["backbone.layers.0.mixer.dt_proj"] == "the model computes with its weight without calling it"
    assert fates["backbone.layers.0.mixer.out_proj"] == ""


def test_weights_that_other_kernels_read_only_are_not() -> None:
    settings = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32, "mamba_d_state": 4}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
    jamba = _model(JambaConfig(**_SMALL, **settings, **experts, mamba_dt_rank=4, use_mamba_kernels=False))
    assert read_directly(jamba) == {"model.layers.0.mamba.dt_proj"}
    assert read_directly(_llama()) == frozenset()


class _Peeking(nn.Module):
    """Reads the weight of a layer, of whose values its path depends."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.up(hidden) if bool(hidden.sum() > 0) else hidden @ self.up.weight


def test_the_code_is_believed_where_a_model_needs_data_to_run() -> None:
    model = _llama()
    model.model.norm = _Peeking()
    assert read_directly(model) == {"model.norm.up"}


def test_weights_shared_by_blocks_stay_as_they_are() -> None:
    model = _llama()
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    second.self_attn.q_proj = first.self_attn.q_proj
    fixed = {layer.path for block in structure(model).blocks for layer in block.layers if layer.fixed}
    assert fixed == {f"model.layers.{index}.mlp.up_proj" for index in (0, 1)} | {"model.layers.0.self_attn.q_proj"}


def test_blocks_are_looked_for_in_the_whole_model_where_its_decoder_has_none() -> None:
    model = _llama()
    model.decoder = nn.Linear(16, 32)
    assert model.get_decoder() is model.decoder
    assert find_blocks(model) == ("model.layers.0", "model.layers.1")


@pytest.mark.parametrize("path", ["transformer.h.0.attn", "transformer.h.1.attn"])
def test_buffers_that_are_not_saved_are_refilled(path: str) -> None:
    model = _model(GPTJConfig(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8, rotary_dim=4))
    expected = copy.deepcopy(dict(model.named_buffers()))
    for buffer in model.buffers():
        buffer.fill_(torch.nan)
    refill(model, [path])
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]) == name.startswith(path)


def test_matrices_of_other_modules_are_kept_with_a_reason() -> None:
    sizes = {"kv_channels": 8, "num_key_value_heads": 1, "num_local_experts": 2, "intermediate_size": 16}
    jetmoe = _model(JetMoeConfig(**_SMALL, **sizes))
    block, _ = structure(jetmoe).blocks
    shapes = {layer.path: (layer.out_features, layer.in_features, layer.fixed) for layer in block.layers}
    reason = "JetMoeParallelExperts is no linear layer"
    assert shapes["model.layers.0.mlp.input_linear"] == (2 * 2 * 16, 16, reason)
    attention, mlp = (f"model.layers.0.{path}" for path in ("self_attention.experts", "mlp"))
    assert {path for path, (_, _, fixed) in shapes.items() if fixed == reason} == {
        f"{parent}.{name}" for parent in (attention, mlp) for name in ("input_linear", "output_linear")
    }
