"""Opening folders and models in memory, and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    dynamic_module_utils,
)

from autoround.errors import ModelError
from autoround.model.load import OpenModel, open_model
from autoround.model.names import match_names
from tests.model import tiny

WEIGHTS = "model.safetensors"


def _assert_same_tensors(model: OpenModel, expected: PreTrainedModel) -> None:
    """Every tensor of the model is read as it is there, under any name."""
    tensors = expected.state_dict()
    assert set(model.source.names()) == {name for name, _ in expected.named_parameters()}
    for name, tensor in tensors.items():
        assert torch.equal(model.source.read(name), tensor)
        assert model.source.shape(name) == tuple(tensor.shape)
        assert model.source.dtype(name) == tensor.dtype


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_folder(name: str, tmp_path: Path) -> None:
    original = tiny.save(name, tmp_path)
    model = open_model(tmp_path)
    assert type(model.skeleton) is type(original)
    assert not model.skeleton.training
    assert all(parameter.is_meta for parameter in model.skeleton.parameters())
    for buffer_name, buffer in model.skeleton.named_buffers():
        assert torch.equal(buffer, original.get_buffer(buffer_name))
    stored = load_file(tmp_path / WEIGHTS)
    assert {model.source.checkpoint_name(each) for each in model.source.names()} == set(stored)
    _assert_same_tensors(model, original)


def test_shards(tmp_path: Path) -> None:
    original = tiny.save("llama", tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    _assert_same_tensors(open_model(tmp_path), original)


def test_configuration_and_dtype_stay_as_stored(tmp_path: Path) -> None:
    original = tiny.make("llama").to(torch.bfloat16)
    original.save_pretrained(tmp_path)
    model = open_model(str(tmp_path))
    assert model.config.dtype == torch.bfloat16
    _assert_same_tensors(model, original)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2_with_and_without_prefix(prefix: str, tmp_path: Path) -> None:
    original = tiny.save("gpt2", tmp_path)
    tensors = {name.replace("transformer.", prefix): each for name, each in load_file(tmp_path / WEIGHTS).items()}
    tensors[f"{prefix}h.0.attn.bias"] = torch.ones(1)  # a mask that old checkpoints carry along
    save_file(tensors, tmp_path / WEIGHTS)
    model = open_model(tmp_path)
    _assert_same_tensors(model, original)
    assert model.source.checkpoint_name("transformer.h.0.ln_1.weight") == f"{prefix}h.0.ln_1.weight"


def test_renamed_tensors_keep_their_checkpoint_name(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    original = AutoModelForCausalLM.from_config(GPTNeoXConfig(**sizes, vocab_size=8, tie_word_embeddings=False))
    original.config.save_pretrained(tmp_path)
    save_file({name.replace("lm_head", "embed_out"): each for name, each in original.state_dict().items()},
              tmp_path / WEIGHTS)  # fmt: skip
    model = open_model(tmp_path)
    _assert_same_tensors(model, original)
    assert model.source.checkpoint_name("lm_head.weight") == "embed_out.weight"


def test_names_that_only_look_old_are_kept() -> None:
    model = tiny.make("llama")
    model.model.LayerNorm = nn.ParameterDict({"gamma": torch.ones(1)})
    assert match_names(model, ["model.LayerNorm.gamma"], "here").single == {
        "model.LayerNorm.gamma": "model.LayerNorm.gamma"
    }


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_are_stored_under_either_name(kept: str, tmp_path: Path) -> None:
    original = tiny.save("llama_tied", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[kept] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / WEIGHTS)
    source = open_model(tmp_path).source
    assert {"model.embed_tokens.weight", "lm_head.weight"} & set(source.names()) == {kept}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(source.read(name), original.lm_head.weight)
        assert source.checkpoint_name(name) == kept


def test_tensors_that_the_model_lacks_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = tiny.save("llama", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors | {"model.norm.odd": torch.ones(1)}, tmp_path / WEIGHTS)
    _assert_same_tensors(open_model(tmp_path), original)
    assert "left out 1 tensors that the model does not have, such as model.norm.odd" in caplog.text


def test_model_in_memory_is_neither_copied_nor_changed() -> None:
    original = tiny.make("gemma3").train()
    before = {name: (tensor, tensor.clone()) for name, tensor in original.state_dict(keep_vars=True).items()}
    model = open_model(original)
    assert original.training
    assert not model.skeleton.training
    for name, (tensor, copy) in before.items():
        assert original.state_dict(keep_vars=True)[name] is tensor
        assert torch.equal(tensor, copy)
        assert model.source.read(name).data_ptr() == tensor.data_ptr()
    _assert_same_tensors(model, original)


def test_attention_can_be_chosen(tmp_path: Path) -> None:
    original = tiny.save("llama", tmp_path)
    for model in (tmp_path, original):
        assert open_model(model).skeleton.config._attn_implementation == "sdpa"
        assert open_model(model, attn_implementation="eager").skeleton.config._attn_implementation == "eager"
    assert original.config._attn_implementation == "sdpa"


def test_tokenizer_and_side_files(tmp_path: Path) -> None:
    original = tiny.save("llama", tmp_path)
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "modeling_own.py").write_text("")
    (tmp_path / "README.md").write_text("")
    model = open_model(tmp_path)
    assert model.tokenizer()("a")["input_ids"] == [1]
    names = ["generation_config.json", "modeling_own.py", "tokenizer.json", "tokenizer_config.json"]
    assert [file.name for file in model.side_files()] == names
    assert open_model(original, tokenizer=tokenizer).tokenizer() is tokenizer
    assert open_model(original, tokenizer=str(tmp_path)).tokenizer()("a")["input_ids"] == [1]
    assert open_model(original).side_files() == ()
    with pytest.raises(ModelError, match="LlamaForCausalLM: found no tokenizer with a model in memory; .*tokenizer="):
        open_model(original).tokenizer()


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_the_model_runs_only_if_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = tmp_path / "own"
    original = tiny.save("llama", folder)
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    _set(model_type="own_llama", auto_map=code)(folder)
    (folder / "modeling_own.py").write_text(OWN_CODE)
    with pytest.raises(ModelError, match="own_llama, which needs the Python code .* --trust_remote_code"):
        open_model(folder)
    model = open_model(folder, trust_remote_code=True)
    assert type(model.skeleton).__name__ == "OwnForCausalLM"
    _assert_same_tensors(model, original)
    assert "modeling_own.py" in [file.name for file in model.side_files()]


def _truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])


def _pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _set(**settings: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))

    return change


def _drop(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors: dict[str, Tensor] = load_file(folder / WEIGHTS)
        del tensors[name]
        save_file(tensors, folder / WEIGHTS)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, r"model\.safetensors: found a damaged or truncated file"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), r"model\.safetensors: found a damaged or truncated file"),
        (lambda folder: (folder / WEIGHTS).write_text("<html>" * 9), r"model\.safetensors: found a damaged"),
        (lambda folder: (folder / WEIGHTS).unlink(), r"found no weights; needed model\.safetensors"),
        (_pickle_only, r"found pytorch_model\.bin; needed model\.safetensors .*convert it: .*save_pretrained"),
        (_drop("model.norm.weight"), r"found no tensor model\.norm\.weight \(1 are missing\)"),
        (_set(hidden_size=64), r"found model\.embed_tokens\.weight of shape \(48, 32\); needed \(48, 64\)"),
        (lambda folder: (folder / "config.json").unlink(), r"found no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: found invalid JSON"),
        (_set(model_type="no_such"), r"config\.json: found model type no_such; needed"),
        (_set(model_type="no_such", auto_map={"AutoConfig": "own.C"}), r"--trust_remote_code"),
        (_set(model_type="vit"), r"found model type vit; needed a decoder-only language model"),
        (_set(model_type="t5"), r"found model type t5; needed a decoder-only language model"),
        (_set(num_attention_heads=5), r"config\.json: found a configuration that transformers refuses: .*multiple"),
        (_set(quantization_config={"quant_method": "gptq"}), r"found weights already quantized by gptq"),
    ],
)
def test_folders_that_cannot_be_opened(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        open_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "truncated", "index"])
def test_damaged_shards(damage: str, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard = tmp_path / "model.safetensors.index.json"
        shard.write_text("[]")
    with pytest.raises(ModelError, match=re.escape(shard.name)):
        open_model(tmp_path)


def test_other_modules_and_offloaded_models_are_refused() -> None:
    with pytest.raises(ModelError, match="Linear: found a plain module; needed a transformers model"):
        open_model(nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"found model\.embed_tokens\.weight without data"):
        open_model(tiny.make("llama").to("meta"))
