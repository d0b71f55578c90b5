"""Checkpoints of mixtures of experts: stacked when they are read, and described for the plan."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from autoround.errors import ModelError
from autoround.model.experts import ROUTER, describe
from autoround.model.load import open_model
from autoround.model.read import read_block
from tests.engine.mixtures import APART, MODELS, STACKED, make
from tests.formats.gguf_models import make as make_gguf
from tests.formats.gguf_models import write_model

WEIGHTS = "model.safetensors"
STACK = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("name", MODELS)
def test_folders_read_as_the_model_in_memory(name: str, tmp_path: Path) -> None:
    original = make(name)
    original.save_pretrained(tmp_path, max_shard_size="40KB")
    folder, memory = open_model(tmp_path), open_model(original)
    for each, tensor in original.state_dict().items():
        assert torch.equal(folder.source.read(each), tensor), each
        assert folder.source.shape(each) == tuple(tensor.shape)
        assert folder.source.pieces(each) == memory.source.pieces(each)
        if not folder.source.pieces(each):
            assert folder.source.checkpoint_name(each) == memory.source.checkpoint_name(each)
    one, two = (read_block(model, "model.layers.1") for model in (folder, memory))
    assert list(one) == list(two)
    assert all(torch.equal(one[each], two[each]) for each in one)


@pytest.mark.parametrize("name", APART)
def test_every_piece_is_a_tensor_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    stored, pieces = load_file(tmp_path / WEIGHTS), open_model(model).source.pieces(STACK)
    assert [len(own) for own in pieces] == [2] * 4
    rows = torch.stack([torch.cat([stored[key] for key in own]) for own in pieces])
    assert torch.equal(rows, model.get_parameter(STACK))


@pytest.mark.parametrize("name", APART)
def test_experts_may_be_quantized_and_routers_not(name: str) -> None:
    skeleton = open_model(make(name)).skeleton
    layers = {layer.path.removeprefix("model.layers.1."): layer for layer in describe(skeleton).blocks[1].layers}
    gate_up, down = layers["mlp.experts.gate_up_proj"], layers["mlp.experts.down_proj"]
    assert (gate_up.experts, gate_up.parts, down.experts, down.parts) == (4, 2, 4, 1)
    assert (gate_up.rows * 8, down.rows * 4) == (gate_up.out_features, down.out_features)
    assert gate_up.fixed == down.fixed == layers["self_attn.o_proj"].fixed == ""
    assert {path for path, layer in layers.items() if layer.fixed} == {
        "mlp.gate",
        *(["mlp.shared_expert_gate"] if name == "qwen2_moe" else []),
    }
    assert layers["mlp.gate"].fixed == ROUTER


def test_experts_that_checkpoints_stack_are_told_apart() -> None:
    layers = describe(open_model(make(STACKED)).skeleton).blocks[0].layers
    assert [layer.path.rpartition(".")[2] for layer in layers if layer.fixed] == ["router"]
    assert [layer.path.rpartition(".")[2] for layer in layers if layer.whole] == ["gate_up_proj", "down_proj"]


def test_a_stack_that_a_checkpoint_holds_whole_is_read_whole(tmp_path: Path) -> None:
    model = make("qwen3_moe")
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / WEIGHTS)
    source = open_model(tmp_path).source
    assert torch.equal(source.read(STACK), model.get_parameter(STACK))
    assert source.checkpoint_name(STACK) == STACK


def test_missing_and_unequal_experts_are_named(tmp_path: Path) -> None:
    make("qwen3_moe").save_pretrained(tmp_path)
    stored, key = load_file(tmp_path / WEIGHTS), "model.layers.1.mlp.experts.2.up_proj.weight"
    save_file({name: tensor for name, tensor in stored.items() if name != key}, tmp_path / WEIGHTS)
    with pytest.raises(
        ModelError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: found 3 tensors .* each of 4 experts"
    ):
        open_model(tmp_path)
    save_file(stored | {key: torch.ones(1, 64)}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match=r"gate_up_proj: found experts of different shapes"):
        open_model(tmp_path)


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
def test_gguf_files_read_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    write_model(make_gguf(name), tmp_path / "tiny.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).state_dict()
    source = open_model(tmp_path / "tiny.gguf").source
    assert STACK in source.names()
    for each in source.names():
        assert torch.equal(source.read(each), read[each]), each
    assert source.pieces(STACK)[3] == tuple(
        f"model.layers.1.mlp.experts.3.{part}_proj.weight" for part in ("gate", "up")
    )


def test_gguf_files_whose_experts_transformers_does_not_read_are_refused(tmp_path: Path) -> None:
    write_model(make_gguf("mixtral"), tmp_path / "tiny.gguf")
    with pytest.raises(ModelError, match=r"ffn_down_exps|ffn_gate_exps|ffn_up_exps"):
        open_model(tmp_path / "tiny.gguf")


def test_gguf_files_whose_sizes_transformers_does_not_read_are_refused(tmp_path: Path) -> None:
    write_model(make_gguf("qwen3_moe", moe_intermediate_size=64), tmp_path / "tiny.gguf")
    with pytest.raises(ModelError, match=r"found blk\.0\.ffn_down_exps\.weight of 4 x 32 x 64; needed \(4, 32, 768\)"):
        open_model(tmp_path / "tiny.gguf")
