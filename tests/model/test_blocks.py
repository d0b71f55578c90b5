"""Structure found from modules, and reading blocks."""

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from autoround.errors import ModelError
from autoround.model.blocks import find_blocks, structure
from autoround.model.load import open_model
from autoround.model.read import BlockReader, read_block
from autoround.model.source import WeightSource
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


class _Watched:
    """A source that notes which thread read a tensor; one of them cannot be read."""

    def __init__(self, source: WeightSource, broken: str) -> None:
        self._whole, self._broken = source, broken
        self.threads: dict[str, threading.Thread] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def read(self, name: str) -> Tensor:
        self.threads[name] = threading.current_thread()
        if name == self._broken:
            raise ModelError(f"{name}: broken")
        return self._whole.read(name)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_reader_is_one_block_ahead(ahead: bool, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    model, paths = open_model(tmp_path), ["model.layers.0", "model.layers.1"]
    source = _Watched(model.source, broken="")
    reader = BlockReader(dataclasses.replace(model, source=source), paths, ahead=ahead)
    for path in (paths[0], paths[0], paths[1], paths[0]):  # some are begun again
        found, expected = reader.read(path), read_block(model, path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        if path == paths[1]:
            own = source.threads["model.layers.1.mlp.up_proj.weight"]
            assert (own is threading.main_thread()) == (not ahead)


def test_what_cannot_be_read_ahead_is_told_of_its_own_block(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    model, paths = open_model(tmp_path), ["model.layers.0", "model.layers.1"]
    source = _Watched(model.source, broken="model.layers.1.mlp.up_proj.weight")
    reader = BlockReader(dataclasses.replace(model, source=source), paths, ahead=True)
    assert reader.read(paths[0])
    with pytest.raises(ModelError, match="broken"):
        reader.read(paths[1])
