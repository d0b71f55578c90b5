"""From one layout to another, code for code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autoround.cli.main import main
from autoround.convert import open_quantized
from autoround.errors import AutoRoundError, FormatError, ModelError, UsageError
from autoround.export import Target, export_checkpoint
from tests.formats.quantized import quantized, tiny_gpt2, tiny_llama

FOUR_BITS = (
    "auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:gptqmodel", "auto_gptq", "gptq_v2", "auto_awq",
    "llm_compressor",
)  # fmt: skip


def convert(source: Path, form: str, folder: Path) -> Path:
    (found,) = export_checkpoint(source, Target(folder=folder, formats=(form,)))
    return found


def assert_same_tensors(one: Path, two: Path) -> None:
    ours, theirs = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("form", FOUR_BITS)
def test_every_layout_becomes_every_other(form: str, sym: bool, tmp_path: Path) -> None:
    """As if it had been written from the codes: a model that float16 holds exactly loses nothing on the way."""
    tiny = quantized(tiny_llama(bias=True).half().float(), *FOUR_BITS, sym=sym)
    source = tiny.write(form, tmp_path / "source", dtype="float16")
    for other in FOUR_BITS:
        found = convert(source, other, tmp_path / f"to-{other.replace(':', '_')}")
        assert_same_tensors(found, tiny.write(other, tmp_path / other.replace(":", "_"), dtype="float16"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_other_widths_and_mixed_groups(bits: int, tmp_path: Path) -> None:
    tiny = quantized(tiny_llama(), "auto_round", bits=bits, group_size=64)
    source = tiny.write("auto_round", tmp_path / "source")
    opened = open_quantized(source)
    assert opened.plan.specs == tiny.plan.specs
    again = convert(source, "auto_round", tmp_path / "again")
    assert_same_tensors(source, again)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, again)]
    assert configs[0] == configs[1]
    assert open_quantized(convert(source, "gptq_v2", tmp_path / "v2")).plan.specs == tiny.plan.specs
    if bits == 4:
        with pytest.raises(
            UsageError, match="format auto_awq: .*found group_size 32; needed 64 as elsewhere; use auto_r"
        ):
            convert(source, "auto_awq", tmp_path / "awq")


def test_tied_heads_and_conv1d(tmp_path: Path) -> None:
    tiny = quantized(tiny_gpt2(), "auto_gptq")
    source = tiny.write("auto_gptq", tmp_path / "source")
    assert_same_tensors(source, convert(convert(source, "gptq_v2", tmp_path / "v2"), "auto_gptq", tmp_path / "v1"))
    with pytest.raises(UsageError, match="format auto_awq: transformer.h.0.*: it is a Conv1D"):
        convert(source, "auto_awq", tmp_path / "awq")


def test_no_file_of_the_old_layout_is_left(tmp_path: Path) -> None:
    """Some loaders believe a quantize_config.json before they read config.json."""
    source = quantized(tiny_llama(), "auto_gptq").write("auto_gptq", tmp_path / "source")
    (source / "chat_template.jinja").write_text("mine")
    found = {path.name for path in convert(source, "llm_compressor", tmp_path / "out").iterdir()}
    assert found == {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"}


def test_the_dense_weights(tmp_path: Path) -> None:
    tiny = quantized(tiny_llama(), "auto_gptq", bits=3)
    found = convert(tiny.write("auto_gptq", tmp_path / "source"), "fake", tmp_path / "dense")
    assert_same_tensors(found, tiny.write("fake", tmp_path / "fake", dtype="float16"))


def test_codes_that_do_not_fit(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight.abs_()  # zero points of 0
    source = quantized(model, "gptq_v2", sym=False).write("gptq_v2", tmp_path / "source")
    with pytest.raises(FormatError, match=r"layers.0.mlp.up_proj: found \d+ zero points of 0"):
        convert(source, "auto_gptq", tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = quantized(tiny_llama(), "auto_gptq").write("auto_gptq", tmp_path / "source")
    assert main(["export", str(source), "--format", "auto_awq", "--output_dir", str(tmp_path / "awq")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'awq'}\n"


def test_folders_that_are_not_quantized_or_damaged(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    with pytest.raises(ModelError, match=r"float: found no quantization_config in config.json"):
        convert(tmp_path / "float", "auto_awq", tmp_path / "out")
    with pytest.raises(AutoRoundError, match="absent"):
        convert(tmp_path / "absent", "auto_awq", tmp_path / "out")
    source = quantized(tiny_llama(), "auto_gptq").write("auto_gptq", tmp_path / "source")
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ModelError, match=r"model.safetensors: found a damaged or truncated file"):
        convert(source, "auto_awq", tmp_path / "out")
