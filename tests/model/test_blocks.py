"""Structure found from modules."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autoround.errors import ModelError
from autoround.model.blocks import find_blocks, structure
from autoround.model.load import open_model
from autoround.model.read import read_block
from tests.model import tiny


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_linear_weight_is_in_the_structure_once(name: str) -> None:
    model = tiny.make(name)
    found = structure(model)
    assert [block.path for block in found.blocks] == list(find_blocks(model))
    inside = [layer for block in found.blocks for layer in block.layers]
    assert [layer.path for layer in found.outside] == ["lm_head"]
    shapes = {layer.path: (layer.out_features, layer.in_features) for layer in inside}
    weights = {
        path: tuple(module.weight.mT.shape if type(module).__name__ == "Conv1D" else module.weight.shape)
        for path, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and path != "lm_head"
    }
    assert shapes == weights


def test_conv1d_is_listed_and_read_as_out_by_in() -> None:
    model = open_model(tiny.make("gpt2"))
    block = structure(model.skeleton).blocks[0]
    up = next(layer for layer in block.layers if layer.path.endswith("c_fc"))
    assert (up.out_features, up.in_features) == (128, 32)
    assert read_block(model, block.path)["mlp.c_fc.weight"].shape == (128, 32)


@pytest.mark.parametrize(("name", "owner"), [("llama", ""), ("llama_tied", "model.embed_tokens")])
def test_tied_heads_are_noted(name: str, owner: str, tmp_path: Path) -> None:
    tiny.save(name, tmp_path)
    (head,) = structure(open_model(tmp_path).skeleton).outside
    assert (head.path, head.tied_to) == ("lm_head", owner)


def test_read_block_casts_only_on_request(tmp_path: Path) -> None:
    original = tiny.make("llama").to(torch.bfloat16)
    original.save_pretrained(tmp_path)
    model = open_model(tmp_path)
    stored, cast = read_block(model, "model.layers.1"), read_block(model, "model.layers.1", dtype=torch.float32)
    expected = dict(original.get_submodule("model.layers.1").named_parameters())
    assert stored.keys() == cast.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(stored[name], parameter)
        assert cast[name].dtype == torch.float32
        assert torch.equal(cast[name], parameter.float())


def test_a_model_without_blocks_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=8))
    model.model.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
    with pytest.raises(ModelError, match="LlamaForCausalLM: found no repeated blocks"):
        find_blocks(model)
