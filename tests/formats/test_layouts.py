"""Layouts: tensors, their independent unpacking, and the quantization configs."""

import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autoround import func
from autoround.errors import FormatError, UsageError
from autoround.formats.registry import get_format, rules
from autoround.formats.writer import untie
from autoround.func import IntCodes, QuantSpec
from autoround.plan import BlockShape, LayerShape, Plan, Structure
from autoround.resolve import resolve

# Stored zero points of the symmetric grid in version 1 files: the midpoint minus one in every field.
SYMMETRIC_WORDS = {2: [0x55555555], 3: [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D], 4: [0x77777777], 8: [0x7F7F7F7F]}
PACKED = (
    "auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:gptqmodel", "auto_gptq", "gptq_v2", "auto_awq",
    "llm_compressor",
)  # fmt: skip
TRUE_WORDS = {2: [0xAAAAAAAA], 3: [0x24924924, 0x49249249, 0x92492492], 4: [0x88888888], 8: [0x80808080]}


def _codes(spec: QuantSpec, rows: int, columns: int, seed: int) -> IntCodes:
    """Any codes a spec allows, scales of both signs included."""
    generator = torch.Generator().manual_seed(seed)
    groups = columns // spec.group_of(columns)
    zero_OG = torch.randint(spec.zero_min, 2**spec.bits, (rows, groups), generator=generator, dtype=torch.uint8)
    return IntCodes(
        torch.randint(2**spec.bits, (rows, columns), generator=generator, dtype=torch.uint8),
        torch.randn(rows, groups, generator=generator).to(getattr(torch, spec.scale_dtype)),
        torch.full_like(zero_OG, spec.midpoint) if spec.sym else zero_OG,
    )


def _assert_same(found: IntCodes, expected: IntCodes) -> None:
    for field, got, wanted in zip(IntCodes._fields, found, expected, strict=True):
        assert got.dtype == wanted.dtype, field
        assert torch.equal(got, wanted), field


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(PACKED),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 16, 32]),
    sym=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**31),
)
def test_unpack_undoes_pack(
    name: str, bits: int, group_size: int, sym: bool, scale_dtype: str, shape: tuple[int, int], seed: int
) -> None:
    form, rule = get_format(name), rules(name)
    assume(bits in rule.bits and (not rule.scale_dtypes or scale_dtype in rule.scale_dtypes))
    spec = QuantSpec(bits=bits, group_size=group_size, sym=sym, scale_dtype=scale_dtype, zero_min=rule.zero_min)
    codes = _codes(spec, 32 * shape[0], 32 * shape[1], seed)
    unpacked = form.unpack(form.pack(codes, spec), spec)
    assert isinstance(unpacked, IntCodes)
    _assert_same(unpacked, codes)


@pytest.mark.parametrize("bits", SYMMETRIC_WORDS)
def test_zero_points_in_the_file(bits: int) -> None:
    spec = QuantSpec(bits=bits, group_size=32)
    codes = _codes(spec, 32, 64, 0)
    for name in ("auto_round:auto_gptq", "auto_gptq"):
        assert _words(get_format(name).pack(codes, spec)["qzeros"]) == _two_rows(SYMMETRIC_WORDS[bits], bits)
    asym = QuantSpec(bits=bits, group_size=32, sym=False)
    for name in ("auto_round:gptqmodel", "gptq_v2"):
        assert _words(get_format(name).pack(codes, asym)["qzeros"]) == _two_rows(TRUE_WORDS[bits], bits)


def _two_rows(pattern: list[int], bits: int) -> list[int]:
    """The words of two groups with 32 outputs each."""
    return pattern * (2 * bits // len(pattern))


def _words(tensor: torch.Tensor) -> list[int]:
    return [word % 2**32 for word in tensor.flatten().tolist()]


def test_tensors_of_auto_gptq() -> None:
    spec = QuantSpec(bits=3, group_size=16)
    tensors = get_format("auto_gptq").pack(_codes(spec, 32, 64, 0), spec)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "qweight": (torch.int32, (6, 32)),
        "qzeros": (torch.int32, (4, 3)),
        "scales": (torch.float16, (4, 32)),
        "g_idx": (torch.int32, (64,)),
    }
    assert tensors["g_idx"].tolist() == [column // 16 for column in range(64)]


def test_auto_round_has_no_g_idx() -> None:
    spec = QuantSpec(group_size=32)
    tensors = get_format("auto_round:auto_gptq").pack(_codes(spec, 32, 32, 0), spec)
    assert set(tensors) == {"qweight", "qzeros", "scales"}
    assert "g_idx" in get_format("auto_round:gptqmodel").pack(_codes(spec, 32, 32, 0), spec)


def test_words_of_auto_awq() -> None:
    """Nibbles of a word from the lowest on hold columns 0, 2, 4, 6, 1, 3, 5, 7 of eight outputs."""
    spec = QuantSpec(group_size=32)
    codes = _codes(spec, 32, 32, 0)._replace(q_OI=(torch.arange(32)[:, None] % 8).expand(32, 32).to(torch.uint8))
    tensors = get_format("auto_awq").pack(codes, spec)
    assert set(_words(tensors["qweight"])) == {0x75316420}
    assert _words(tensors["qzeros"]) == [0x88888888] * 4
    assert [tuple(tensors[name].shape) for name in ("qweight", "qzeros", "scales")] == [(32, 4), (1, 4), (1, 32)]


def test_tensors_of_llm_compressor() -> None:
    spec = QuantSpec(bits=8, group_size=16, sym=False, scale_dtype="bfloat16")
    codes = _codes(spec, 32, 64, 0)
    tensors = get_format("llm_compressor").pack(codes, spec)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "weight_packed": (torch.int32, (32, 16)),
        "weight_scale": (torch.bfloat16, (32, 4)),
        "weight_shape": (torch.int64, (2,)),
        "weight_zero_point": (torch.int32, (8, 4)),
    }
    assert tensors["weight_shape"].tolist() == [32, 64]
    assert tensors["weight_packed"].view(torch.uint8)[3].tolist() == codes.q_OI[3].tolist()
    sym = QuantSpec(bits=8, group_size=16)
    assert "weight_zero_point" not in get_format("llm_compressor").pack(_codes(sym, 32, 64, 0), sym)
    with pytest.raises(FormatError, match="found zero points other than 128; needed none for symmetric codes"):
        get_format("llm_compressor").pack(codes, sym)
    tensors["weight_shape"] = torch.tensor([64, 32])
    with pytest.raises(FormatError, match=r"found weight_shape \[64, 32\]; needed \[32, 64\]"):
        get_format("llm_compressor").unpack(tensors, spec)


def test_a_zero_point_of_0_does_not_fit_version_1() -> None:
    spec = QuantSpec(group_size=32, sym=False)
    codes = _codes(spec, 32, 32, 0)
    codes = codes._replace(zero_OG=torch.zeros_like(codes.zero_OG))
    with pytest.raises(FormatError, match=r"found 32 zero points of 0; needed at least 1.*gptq_v2 or auto_round"):
        get_format("auto_gptq").pack(codes, spec)
    assert "qzeros" in get_format("gptq_v2").pack(codes, spec)


def test_auto_gptq_takes_float16_scales_only() -> None:
    spec = QuantSpec(group_size=32, scale_dtype="float32")
    with pytest.raises(FormatError, match="--scale_dtype float16"):
        get_format("auto_gptq").pack(_codes(spec, 32, 32, 0), spec)


def test_reordered_columns_are_no_file_of_ours() -> None:
    spec, form = QuantSpec(group_size=16), get_format("auto_gptq")
    tensors = form.pack(_codes(spec, 32, 32, 0), spec)
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(FormatError, match="g_idx"):
        form.unpack(tensors, spec)


def test_fake_is_the_dequantized_weight() -> None:
    spec = QuantSpec(bits=2, group_size=5)  # no layout that packs takes this shape
    codes, form = _codes(spec, 3, 10, 0), get_format("fake")
    tensors = form.pack(codes, spec)
    assert list(tensors) == ["weight"]
    assert torch.equal(form.unpack(tensors, spec), func.dequantize(codes, spec))


def _plan(name: str, *, kept: tuple[str, ...] = (), rows: int = 64, odd: int | None = None, **spec: Any) -> Plan:
    """Two blocks of two layers; ``kept`` ones have 33 outputs, and block 1 has ``odd`` inputs."""

    def block(index: int) -> BlockShape:
        path = f"model.layers.{index}"
        columns = odd if odd is not None and index == 1 else 64
        shapes = (("a", rows, 64), ("mlp.b", 64, columns))
        return BlockShape(
            path=path,
            layers=tuple(
                LayerShape(
                    path=f"{path}.{own}", out_features=33 if f"{path}.{own}" in kept else out, in_features=columns
                )
                for own, out, columns in shapes
            ),
        )

    structure = Structure(architecture="X", blocks=(block(0), block(1)))
    return resolve(QuantSpec(**{"group_size": 64, **spec}), "fit", structure, [rules(name)])


def test_config_of_auto_round() -> None:
    plan = _plan("auto_round", kept=("model.layers.0.a",), odd=96, bits=3)
    assert _config("auto_round", plan) == {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 3,
        "group_size": 64,
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": "model.layers",
        "extra_config": {
            "model.layers.0.a": {"bits": 16, "data_type": "fp"},
            "model.layers.1.mlp.b": {"bits": 3, "group_size": 32, "sym": True, "data_type": "int"},
        },
    }


def _config(name: str, plan: Plan) -> dict[str, Any]:
    config = get_format(name).suited(plan).config(plan)
    assert config is not None
    return config


@pytest.mark.parametrize(
    ("settings", "odd", "packing"),
    [
        ({"sym": True}, None, "auto_round:auto_gptq"),
        ({"sym": True, "bits": 3}, 96, "auto_round:auto_gptq"),
        ({"sym": False}, None, "auto_round:auto_awq"),
        ({"sym": False}, 96, "auto_round"),  # group sizes differ, which AWQ cannot say
        ({"sym": False, "bits": 3}, None, "auto_round"),
        ({"sym": False, "scale_dtype": "bfloat16"}, None, "auto_round"),
        ({"sym": False, "group_size": 8}, None, "auto_round"),
    ],
    ids=str,
)
def test_auto_round_takes_the_packing_that_most_loaders_read(
    settings: dict[str, Any], odd: int | None, packing: str
) -> None:
    plan = _plan("auto_round", odd=odd, **settings)
    config = _config("auto_round", plan)
    assert (config["packing_format"], config["sym"]) == (packing, settings["sym"])
    assert get_format("auto_round").suited(plan).dtype == ("float16" if packing == "auto_round:auto_awq" else None)


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:gptqmodel"])
def test_a_packing_that_is_asked_for_is_taken(packing: str) -> None:
    assert _config(packing, _plan(packing, sym=False))["packing_format"] == packing
    assert rules(packing).zero_min == int(packing == "auto_round:auto_gptq")


def test_config_of_auto_awq() -> None:
    config = _config("auto_awq", _plan("auto_awq", kept=("model.layers.1.a",), odd=96))
    assert config == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "zero_point": True,
        "modules_to_not_convert": ["model.layers.1.a"],
        "dynamic": {r"-:^model\.layers\.1\.a$": {}},
    }


def test_config_of_llm_compressor() -> None:
    config = _config("llm_compressor", _plan("llm_compressor", sym=False, bits=8, group_size=-1))
    (group,) = config["config_groups"].values()
    weights = {name: group["weights"][name] for name in ("num_bits", "symmetric", "strategy", "group_size")}
    assert group["targets"] == ["Linear"]
    assert weights == {"num_bits": 8, "symmetric": False, "strategy": "channel", "group_size": None}
    assert config["ignore"] == []
    mixed = _config("llm_compressor", _plan("llm_compressor", kept=("model.layers.0.a",), odd=96))
    first, second = mixed["config_groups"].values()
    assert sorted((*first["targets"], *second["targets"])) == [
        "model.layers.0.mlp.b", "model.layers.1.a", "model.layers.1.mlp.b"
    ]  # fmt: skip
    assert [group["weights"]["group_size"] for group in (first, second)] == [64, 32]
    assert mixed["ignore"] == ["model.layers.0.a"]


@pytest.mark.parametrize("name", ["auto_awq", "llm_compressor"])
def test_modules_that_are_not_linear_are_kept(name: str) -> None:
    shapes = [LayerShape(path=f"h.0.{own}", out_features=64, in_features=64, linear=own == "a") for own in "ab"]
    structure = Structure(architecture="X", blocks=(BlockShape(path="h.0", layers=tuple(shapes)),))
    plan = resolve(QuantSpec(group_size=64), "fit", structure, [rules(name)])
    assert list(plan.specs) == ["h.0.a"]
    assert plan.layers["h.0.b"].reason == f"it is a Conv1D, which {name} does not take"


@pytest.mark.parametrize(("name", "bits"), [("auto_awq", 3), ("auto_awq", 8), ("llm_compressor", 3)])
def test_widths_that_a_layout_does_not_hold(name: str, bits: int) -> None:
    with pytest.raises(UsageError, match=f"format {name}: found bits {bits}; needed one of"):
        _plan(name, bits=bits)


def test_config_of_auto_gptq() -> None:
    config = _config("auto_gptq", _plan("auto_gptq", odd=96))
    second = {"checkpoint_format": "gptq_v2", "meta": {"quantizer": ["autoround"]}}
    assert _config("gptq_v2", _plan("gptq_v2", odd=96)) == config | second
    assert config == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 32,  # one for the whole model
        "sym": True,
        "data_type": "int",
        "desc_act": False,
        "true_sequential": False,
        "damp_percent": 0.01,
        "lm_head": False,
    }


def test_layers_kept_in_every_block() -> None:
    kept = ("model.layers.0.a", "model.layers.1.a")
    config = get_format("auto_gptq").config(_plan("auto_gptq", kept=kept))
    assert config is not None
    assert config["modules_in_block_to_quantize"] == [["model.layers.0.mlp.b", "model.layers.1.mlp.b"]]
    [first, second] = config["dynamic"]
    assert first.startswith("-:")
    assert re.match(first[2:], "model.layers.0.a")
    assert not re.match(first[2:], "model.layers.0.ab")
    assert not re.match(first[2:], "model.layers.00a")
    assert re.match(second[2:], "model.layers.1.a")


def test_layers_kept_in_one_block() -> None:
    config = get_format("auto_gptq").config(_plan("auto_gptq", kept=("model.layers.0.a",)))
    assert config is not None
    assert list(config["dynamic"].values()) == [{}]
    others = ["model.layers.0.mlp.b", "model.layers.1.a", "model.layers.1.mlp.b"]
    assert config["modules_in_block_to_quantize"] == [others]


def test_fake_has_no_config() -> None:
    assert get_format("fake").config(_plan("fake")) is None


def test_parts_of_a_model_are_untied_as_well() -> None:
    settings = {
        "tie_word_embeddings": True,
        "text_config": {"tie_word_embeddings": True},
        "vision_config": {"depth": 2},
    }
    untie(settings)
    assert settings == {
        "tie_word_embeddings": False,
        "text_config": {"tie_word_embeddings": False},
        "vision_config": {"depth": 2},
    }
