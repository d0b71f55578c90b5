"""What configurations say of layers with settings of their own, and that it is read back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from autoround.convert import open_quantized
from autoround.errors import UsageError
from autoround.export import Target, export_checkpoint
from autoround.formats.registry import get_format
from autoround.hub import load
from autoround.spec import QuantSpec
from tests.formats.quantized import Quantized, quantized, tiny_llama

LAYERS = {
    "layers.0.self_attn.[qkv]_proj": {"bits": 8},
    "layers.0.mlp": {"sym": False},
    "layers.1.self_attn": {"bits": 8, "group_size": -1},
    "model.layers.1.mlp.down_proj": "keep",
}
KEPT = "model.layers.1.mlp.down_proj"
FORMATS = ("auto_round", "auto_round:gptqmodel", "auto_gptq", "gptq_v2", "llm_compressor")


def mixed(*formats: str, **settings: Any) -> Quantized:
    return quantized(tiny_llama().half().float(), *formats, layers=LAYERS, **settings)


def test_auto_round_names_what_differs() -> None:
    plan = mixed("auto_round").plan
    config = get_format("auto_round").suited(plan).config(plan)
    assert config is not None
    assert config["packing_format"] == "auto_round"  # true zero points, since some layers are asymmetric
    attention, mlp = (f"model.layers.{{}}.{part}.{{}}_proj".format for part in ("self_attn", "mlp"))
    usual = {"bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
    assert config["extra_config"] == {
        **{attention(0, name): usual | {"bits": 8} for name in "qkv"},
        **{mlp(0, name): usual | {"sym": False} for name in ("gate", "up", "down")},
        **{attention(1, name): usual | {"bits": 8, "group_size": -1} for name in "qkvo"},
        KEPT: {"bits": 16, "data_type": "fp"},
    }


def test_gptq_names_all_settings_of_what_differs() -> None:
    plan = mixed("auto_gptq").plan
    config = get_format("auto_gptq").config(plan)
    assert config is not None
    dynamic = config["dynamic"]
    assert len(dynamic) == 14
    assert dynamic[r"+:^model\.layers\.0\.self_attn\.qkv_proj$"] == {"bits": 8, "group_size": 32, "sym": True}
    assert dynamic[r"+:^model\.layers\.0\.mlp\.gate_up_proj$"] == {"bits": 4, "group_size": 32, "sym": False}
    assert dynamic[r"+:^model\.layers\.1\.self_attn\.qkv_proj$"] == {"bits": 8, "group_size": -1, "sym": True}
    assert dynamic[r"+:^model\.layers\.0\.self_attn\.q_proj$"] == {"bits": 8, "group_size": 32, "sym": True}
    assert dynamic[r"+:^model\.layers\.0\.mlp\.up_proj$"] == {"bits": 4, "group_size": 32, "sym": False}
    assert dynamic[r"+:^model\.layers\.1\.self_attn\.o_proj$"] == {"bits": 8, "group_size": -1, "sym": True}
    assert dynamic[r"-:^model\.layers\.1\.mlp\.down_proj$"] == {}
    assert config["modules_in_block_to_quantize"] == [list(plan.specs)]


def test_llm_compressor_has_a_group_of_named_layers_for_each_spec() -> None:
    plan = mixed("llm_compressor").plan
    config = get_format("llm_compressor").config(plan)
    assert config is not None
    groups = {
        (own["num_bits"], own["symmetric"], own["group_size"]): group["targets"]
        for group in config["config_groups"].values()
        for own in [group["weights"]]
    }
    assert {key: len(targets) for key, targets in groups.items()} == {
        (8, True, 32): 3, (4, True, 32): 3, (4, False, 32): 3, (8, True, None): 4}  # fmt: skip
    assert sorted(sum(groups.values(), [])) == sorted(plan.specs)
    assert KEPT in config["ignore"]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_every_layout_becomes_every_other(form: str, sym: bool, tmp_path: Path) -> None:
    tiny = mixed(*FORMATS, sym=sym)
    source = tiny.write(form, tmp_path / "source", dtype="float16")
    ours, theirs = open_quantized(source).plan.specs, tiny.plan.specs
    for path, spec in theirs.items():
        assert ours[path] == QuantSpec(bits=spec.bits, group_size=spec.group_size, sym=spec.sym), path
    expected = load(tiny.write("fake", tmp_path / "fake", dtype="float16"), dtype="float32").state_dict()
    for other in FORMATS:
        (found,) = export_checkpoint(source, Target(folder=tmp_path / other.replace(":", "_"), formats=(other,)))
        packed = load_file(found / "model.safetensors")
        direct = load_file(
            tiny.write(other, tmp_path / "direct", dtype="float16", overwrite=True) / "model.safetensors"
        )
        assert packed.keys() == direct.keys()
        assert all(torch.equal(packed[name], direct[name]) for name in packed)
    (dense,) = export_checkpoint(source, Target(folder=tmp_path / "dense", formats=("fake",)))
    state = load(dense, dtype="float32").state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_what_awq_does_not_hold_is_refused_by_name(tmp_path: Path) -> None:
    tiny = quantized(tiny_llama(), "auto_round", layers={"layers.0.self_attn.[qkv]": {"bits": 8}})
    source = tiny.write("auto_round", tmp_path / "source")
    with pytest.raises(
        UsageError, match=r"format auto_awq: model.layers.0.self_attn.q_proj: found bits 8; needed 4 as"
    ):
        export_checkpoint(source, Target(folder=tmp_path / "awq", formats=("auto_awq",)))


def test_awq_holds_symmetric_and_asymmetric_layers(tmp_path: Path) -> None:
    tiny = quantized(tiny_llama(), "auto_awq", layers={"mlp": {"sym": False}})
    specs = open_quantized(tiny.write("auto_awq", tmp_path / "source")).plan.specs
    assert {path: spec.sym for path, spec in specs.items()} == {path: "mlp" not in path for path in specs}
    config = json.loads((tmp_path / "source" / "config.json").read_text())["quantization_config"]
    assert config["sym"] is False  # else auto-round reads no zero points


def test_a_row_as_long_as_a_group_is_not_taken_for_whole_rows(tmp_path: Path) -> None:
    """Of 64 columns each: one layer in groups of 64, the others in whole rows."""
    tiny = quantized(tiny_llama(), "auto_round", group_size=-1, layers={"layers.0.mlp.up": {"group_size": 64}})
    specs = open_quantized(tiny.write("auto_round", tmp_path / "source")).plan.specs
    sizes = {path.removeprefix("model.layers."): spec.group_size for path, spec in specs.items()}
    assert sizes["0.mlp.up_proj"] == 64
    assert sizes["0.mlp.down_proj"] == -1  # of 96 columns
    config = json.loads((tmp_path / "source" / "config.json").read_text())["quantization_config"]
    assert config["extra_config"] == {
        "model.layers.0.mlp.up_proj": {"bits": 4, "group_size": 64, "sym": True, "data_type": "int"}
    }
