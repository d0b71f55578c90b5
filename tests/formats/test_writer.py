"""The writer and its verification, on files."""

import errno
import json
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from autoround import func
from autoround.errors import FormatError, UsageError
from autoround.formats import writer
from autoround.formats.contents import pieces
from autoround.formats.registry import get_format
from autoround.formats.verify import verify_checkpoint
from autoround.formats.writer import parse_size, write_checkpoint
from autoround.func import IntCodes
from tests.formats.quantized import Quantized, quantized, tiny_gpt2, tiny_llama

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def llama() -> Quantized:
    return quantized(tiny_llama(bias=True), "auto_round", "auto_gptq", "fake", bits=3)


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _config(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / "config.json").read_text())
    return config


def _left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_contents(llama: Quantized, tmp_path: Path) -> None:
    folder = llama.write("auto_round", tmp_path / "out")
    assert _left_behind(tmp_path) == ["out"]
    assert _left_behind(folder) == ["config.json", "generation_config.json", "model.safetensors"]
    tensors = _tensors(folder)
    expected = {name: tuple(tensor.shape) for name, tensor in llama.model.skeleton.state_dict().items()}
    for path in llama.plan.specs:
        rows, columns = expected.pop(f"{path}.weight")
        expected |= {f"{path}.qweight": (columns * 3 // 32, rows), f"{path}.qzeros": (columns // 32, rows * 3 // 32),
                     f"{path}.scales": (columns // 32, rows)}  # fmt: skip
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert torch.equal(tensors["model.embed_tokens.weight"], llama.model.source.read("model.embed_tokens.weight"))
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    assert _config(folder)["quantization_config"] == get_format("auto_round").suited(llama.plan).config(llama.plan)
    assert (_config(folder)["dtype"], _config(folder)["architectures"]) == ("float32", ["LlamaForCausalLM"])
    modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert len(modes) == 1  # weights are as readable as text files


def test_auto_gptq_is_float16_and_repeats_its_config(llama: Quantized, tmp_path: Path) -> None:
    folder = llama.write("auto_gptq", tmp_path / "out", dtype="float32")
    assert {str(tensor.dtype) for tensor in _tensors(folder).values()} == {"torch.float16", "torch.int32"}
    config = _config(folder)
    assert config["dtype"] == "float16"
    for name in ("quantize_config.json", "quantization_config.json"):
        assert json.loads((folder / name).read_text()) == config["quantization_config"]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_fake_is_an_ordinary_checkpoint(make: Callable[[], PreTrainedModel], dtype: str | None, tmp_path: Path) -> None:
    model = make()
    tiny = quantized(model, "fake", bits=2)
    folder = tiny.write("fake", tmp_path / "out", dtype=dtype)
    assert "quantization_config" not in _config(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert str(loaded.dtype) == f"torch.{dtype or 'float32'}"
    state = loaded.state_dict()
    for block, codes in zip(tiny.plan.blocks, tiny.blocks, strict=True):
        for relative, spec in block.specs.items():
            path = f"{block.path}.{relative}"
            weight = state[f"{path}.weight"].t() if make is tiny_gpt2 else state[f"{path}.weight"]
            assert torch.equal(weight, func.dequantize(codes[relative], spec).to(loaded.dtype))
    kept = set(state) - {f"{path}.weight" for path in tiny.plan.specs}
    assert all(torch.equal(state[name], model.state_dict()[name].to(loaded.dtype)) for name in kept)


def test_shards_and_their_index(llama: Quantized, tmp_path: Path) -> None:
    folder = llama.write("auto_round", tmp_path / "out", max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 2
    assert files == sorted(file.name for file in folder.glob("*.safetensors"))
    tensors = _tensors(folder)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in files:
        own = load_file(folder / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(own)
        assert sum(tensor.nbytes for tensor in own.values()) <= 20_000 or len(own) == 1
    whole = _tensors(llama.write("auto_round", tmp_path / "whole"))
    assert set(whole) == set(tensors)
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)


@pytest.mark.parametrize(("form", "dtype"), [("auto_round", None), ("fake", "bfloat16")])
def test_files_have_the_bytes_of_safetensors_own(
    form: str, dtype: str | None, llama: Quantized, tmp_path: Path
) -> None:
    folder = llama.write(form, tmp_path / "out", max_shard_size="30KB", dtype=dtype)
    for file in folder.glob("*.safetensors"):
        assert file.read_bytes() == save(load_file(file), {"format": "pt"})


@pytest.mark.parametrize("make", [lambda: tiny_llama(tied=True), tiny_gpt2])
def test_a_tied_head_is_written_once(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    assert "lm_head.weight" not in _tensors(quantized(make()).write("auto_round", tmp_path / "memory"))
    source = tmp_path / "source"
    make().save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    embedding = next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
    save_file(tensors | {"lm_head.weight": tensors[embedding].clone()}, source / "model.safetensors", {"format": "pt"})
    assert "lm_head.weight" not in _tensors(quantized(source).write("auto_round", tmp_path / "stored_twice"))


def test_side_files_are_taken_over(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_llama().save_pretrained(source)
    GenerationConfig(max_new_tokens=7).save_pretrained(source)
    others = {"tokenizer.json": "{}", "chat_template.jinja": "x", "modeling_own.py": "y = 1\n"}
    for name, text in others.items():
        (source / name).write_text(text)
    folder = quantized(source).write("auto_round", tmp_path / "out")
    assert {name: (folder / name).read_text() for name in others} == others
    assert (folder / "generation_config.json").read_text() == (source / "generation_config.json").read_text()


@pytest.mark.parametrize("form", ["auto_round", "auto_gptq", "fake"])
def test_heads_foretell_the_tensors(form: str, llama: Quantized) -> None:
    heads, tensors = (list(each) for each in (llama.contents(form).heads(), llama.contents(form).tensors()))
    assert [(name, head.shape) for name, head in heads] == [(name, tensor.shape) for name, tensor in tensors]
    assert all(head.is_meta for _, head in heads)


def test_one_block_of_codes_at_a_time(llama: Quantized, tmp_path: Path) -> None:
    asked: list[int] = []

    def codes(index: int) -> dict[str, IntCodes]:
        asked.append(index)
        return llama.blocks[index]

    write_checkpoint(replace(llama.contents("auto_round"), codes=codes), tmp_path / "out")
    assert asked == [0, 1, 0, 1]  # written, then verified


# Each spoils one thing in the weights of a checkpoint in the layout auto_gptq or fake.
def _flip_bit(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.qweight"][2, 5] ^= 1 << 4


def _flip_zero(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.qzeros"][0, 1] ^= 1


def _negate_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.scales"][1, 2] *= -1


def _nudge_kept(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][3] += 1


def _nudge_fake(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.weight"][1, 2] += 1


def _drop_kept(tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"]


def _drop_packed(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{LAYER}.scales"]


def _add(tensors: dict[str, Tensor]) -> None:
    tensors["model.extra"] = torch.zeros(1)


def _cast(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()


def _cut(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][1:].clone()


@pytest.mark.parametrize(
    ("form", "spoil", "message"),
    [
        # Word 2 of column 5, bit 4: with 3 bits the code of input 22 (bits 2 to 4 of word 2).
        ("auto_gptq", _flip_bit, rf"{LAYER}: q_OI: found \d at \(5, 22\); needed \d; 1 of 6144 elements differ"),
        ("auto_gptq", _flip_zero, rf"{LAYER}: zero_OG: found \d at \(10, 0\); needed 4; 1 of"),
        ("auto_gptq", _negate_scale, rf"{LAYER}: scale_OG: found \S+ at \(2, 1\)"),
        ("auto_gptq", _nudge_kept, r"model.norm.weight: found 2.0 at \(3,\); needed 1.0"),
        ("auto_gptq", _drop_kept, "found no tensor model.norm.weight"),
        ("auto_gptq", _drop_packed, rf"{LAYER}: found no tensor 'scales'"),
        ("auto_gptq", _add, "found unexpected tensor model.extra"),
        ("auto_gptq", _cast, "model.norm.weight: found torch.float64; needed torch.float16"),
        ("auto_gptq", _cut, r"model.norm.weight: found shape \(63,\); needed \(64,\)"),
        ("fake", _nudge_fake, rf"{LAYER}: found \S+ at \(1, 2\)"),
        ("fake", _drop_kept, "found no tensor model.norm.weight"),
    ],
)
def test_verification_sees_every_edit(
    form: str, spoil: Callable[[dict[str, Tensor]], None], message: str, llama: Quantized, tmp_path: Path
) -> None:
    folder = llama.write(form, tmp_path / "out")
    verify_checkpoint(llama.contents(form), folder)
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=message):
        verify_checkpoint(llama.contents(form), folder)


def test_verification_of_damaged_shards(llama: Quantized, tmp_path: Path) -> None:
    folder = llama.write("auto_round", tmp_path / "out", max_shard_size="20KB")
    [first, second, *_] = sorted(folder.glob("*.safetensors"))
    kept = first.read_bytes()
    first.write_bytes(kept[:-1])
    with pytest.raises(FormatError, match=rf"{first.name}: .*; needed a complete file"):
        verify_checkpoint(llama.contents("auto_round"), folder)
    shutil.copyfile(second, first)
    with pytest.raises(FormatError, match=rf"{first.name}: found other tensors than .*index.json lists"):
        verify_checkpoint(llama.contents("auto_round"), folder)
    first.unlink()
    with pytest.raises(FormatError, match=first.name):
        verify_checkpoint(llama.contents("auto_round"), folder)


def test_what_cannot_be_verified_gets_no_name(
    llama: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(tensor: Tensor, dtype: torch.dtype, name: str) -> Iterator[Tensor]:
        return (piece + 1 for piece in pieces(tensor, dtype, name))

    monkeypatch.setattr(writer, "pieces", spoiled)
    with pytest.raises(FormatError, match="elements differ"):
        llama.write("auto_round", tmp_path / "out")
    assert _left_behind(tmp_path) == []


def test_a_disk_that_fills_up(llama: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensor: Tensor, dtype: torch.dtype, name: str) -> Iterator[Tensor]:
        yield from pieces(tensor, dtype, name)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "pieces", fail)
    with pytest.raises(FormatError, match=r"out: found \d+ MB free on the disk; needed about \d+ MB; free some space"):
        llama.write("auto_round", tmp_path / "out")
    assert _left_behind(tmp_path) == []


def test_too_little_space_is_known_beforehand(
    llama: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = _tensors(llama.write("auto_round", tmp_path / "first"))
    nbytes = sum(tensor.nbytes for tensor in written.values())
    usage = SimpleNamespace(free=0)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage)
    usage.free = int(nbytes * 1.1)
    llama.write("auto_round", tmp_path / "second")
    usage.free = int(nbytes * 0.9)
    with pytest.raises(FormatError, match="needed about"):
        llama.write("auto_round", tmp_path / "third")
    assert _left_behind(tmp_path) == ["first", "second"]


def test_a_folder_in_use_is_not_touched(llama: Quantized, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    llama.write("fake", folder)  # empty is as good as absent
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match="out: found other files; .*--overwrite"):
        llama.write("auto_round", folder)
    assert (folder / "notes.txt").exists()
    llama.write("auto_round", folder, overwrite=True)
    assert not (folder / "notes.txt").exists()
    assert _left_behind(tmp_path) == ["out"]
    with pytest.raises(FormatError, match="found a file; needed a folder"):
        llama.write("auto_round", folder / "config.json")


def test_a_failed_export_leaves_the_old_one(llama: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = llama.write("auto_round", tmp_path / "out")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llama.write("fake", folder, overwrite=True)
    assert _left_behind(tmp_path) == ["out"]
    verify_checkpoint(llama.contents("auto_round"), folder)


def test_codes_a_layout_cannot_hold_are_named(tmp_path: Path) -> None:
    tiny = quantized(tiny_llama(), "auto_round", sym=False)  # planned without the layout, so zero points may be 0
    codes = tiny.blocks[0]["mlp.up_proj"]
    tiny.blocks[0]["mlp.up_proj"] = codes._replace(zero_OG=torch.zeros_like(codes.zero_OG))
    with pytest.raises(FormatError, match=r"model.layers.0.mlp.up_proj: found \d+ zero points of 0; .* auto_round"):
        tiny.write("auto_gptq", tmp_path / "out")
    assert _left_behind(tmp_path) == []


def test_differences_are_counted_over_all_pieces(
    llama: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = llama.write("auto_gptq", tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][[3, 100], [5, 63]] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("autoround.formats.contents.PIECE", 1000)
    with pytest.raises(FormatError, match=r"embed_tokens.weight: found \S+ at \(3, 5\); .*; 2 of 8192 elements differ"):
        verify_checkpoint(llama.contents("auto_gptq"), folder)


def test_values_beyond_float16_are_named(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    with pytest.raises(FormatError, match=r"model.norm.weight: found values up to 1e\+06; needed at most 65504"):
        quantized(model, "auto_gptq").write("auto_gptq", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("12", 12), (7, 7), ("1.5K", 1500)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "5PB", "0", 0, -3])
def test_impossible_sizes(text: str | int) -> None:
    with pytest.raises(UsageError, match=rf"max_shard_size: found {re.escape(repr(text))}"):
        parse_size(text)
