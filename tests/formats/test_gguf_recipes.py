"""The types of tensors: worked out by hand from llama.cpp's rules for models of known shapes."""

import subprocess
import sys

import gguf
import pytest

from autoround.errors import UsageError
from autoround.formats.gguf.recipes import FILE_TYPES, tensor_types
from autoround.spec import GGUF_TYPES

Shapes = dict[str, tuple[int, ...]]
# A type for all layers, or the type of the layers listed and the type of the others.
PerLayer = str | tuple[str, set[int], str]

# The first and the last eighth of 32 layers (4) and every third between; the same of 30 (3, and from 26 on).
MORE_32 = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
MORE_30 = {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29}


def _model(layers: int, hidden: int, kv: int, ffn: int, *, tied: bool = False, experts: int = 0) -> Shapes:
    shapes: Shapes = {"token_embd.weight": (32000, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        shapes["output.weight"] = (32000, hidden)
    stack, suffix = ((experts,), "_exps") if experts else ((), "")
    for layer in range(layers):
        parts: Shapes = {
            "attn_norm": (hidden,),
            "attn_q": (hidden, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_output": (hidden, hidden),
            "ffn_norm": (hidden,),
            f"ffn_gate{suffix}": (*stack, ffn, hidden),
            f"ffn_up{suffix}": (*stack, ffn, hidden),
            f"ffn_down{suffix}": (*stack, hidden, ffn),
        }
        if experts:
            parts["ffn_gate_inp"] = (experts, hidden)
        shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return shapes


def _assert_types(found: dict[str, str], layers: int, **expected: PerLayer) -> None:
    """Blocks have these parts in these types, and no others."""
    types = {}
    for part, type_ in expected.items():
        for layer in range(layers):
            chosen = type_ if isinstance(type_, str) else type_[0] if layer in type_[1] else type_[2]
            types[f"blk.{layer}.{part}.weight"] = chosen
    assert {name: type_ for name, type_ in found.items() if name.startswith("blk.")} == types


# File type -> base (attn_q, attn_k, ffn_gate, ffn_up, token_embd), attn_v, attn_output, ffn_down, output.
LLAMA: dict[str, tuple[str, PerLayer, PerLayer, PerLayer, str]] = {
    "q2_k_s": ("q2_k", "q4_k", "q2_k", ("q4_k", {0, 1, 2, 3}, "q2_k"), "q6_k"),
    "q2_k": ("q2_k", "q4_k", "q3_k", "q3_k", "q6_k"),
    "q3_k_s": ("q3_k", "q3_k", "q3_k", "q3_k", "q6_k"),
    "q3_k_m": ("q3_k", ("q5_k", {0, 1}, "q4_k"), "q4_k", ("q5_k", {0, 1}, "q4_k"), "q6_k"),
    "q3_k_l": ("q3_k", "q5_k", "q5_k", "q5_k", "q6_k"),
    "q4_k_s": ("q4_k", ("q5_k", {0, 1, 2, 3}, "q4_k"), "q4_k", ("q5_k", {0, 1, 2, 3}, "q4_k"), "q6_k"),
    "q4_k_m": ("q4_k", ("q6_k", MORE_32, "q4_k"), "q4_k", ("q6_k", MORE_32, "q4_k"), "q6_k"),
    "q5_k_s": ("q5_k", "q5_k", "q5_k", "q5_k", "q6_k"),
    "q5_k_m": ("q5_k", ("q6_k", MORE_32, "q5_k"), "q5_k", ("q6_k", MORE_32, "q5_k"), "q6_k"),
    "q6_k": ("q6_k", "q6_k", "q6_k", "q6_k", "q6_k"),
    "q4_0": ("q4_0", "q4_0", "q4_0", "q4_0", "q6_k"),
    "q4_1": ("q4_1", "q4_1", "q4_1", "q4_1", "q6_k"),
    "q5_0": ("q5_0", "q5_0", "q5_0", "q5_0", "q6_k"),
    "q5_1": ("q5_1", "q5_1", "q5_1", "q5_1", "q6_k"),
    "q8_0": ("q8_0", "q8_0", "q8_0", "q8_0", "q8_0"),
    "f16": ("f16", "f16", "f16", "f16", "f16"),
    "bf16": ("bf16", "bf16", "bf16", "bf16", "bf16"),
}


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_llama_7b_with_grouped_queries(file_type: str) -> None:
    base, attn_v, attn_output, ffn_down, output = LLAMA[file_type]
    found = tensor_types(file_type, _model(32, 4096, 1024, 11008), layers=32, heads=32, kv_heads=8)
    assert (found["token_embd.weight"], found["output.weight"], found["output_norm.weight"]) == (base, output, "f32")
    _assert_types(
        found,
        32,
        **dict.fromkeys(("attn_q", "attn_k", "ffn_gate", "ffn_up"), base),
        **dict.fromkeys(("attn_norm", "ffn_norm"), "f32"),
        attn_v=attn_v,
        attn_output=attn_output,
        ffn_down=ffn_down,
    )


# What differs with as many keys and values as queries.
@pytest.mark.parametrize(("file_type", "attn_v"), [("q2_k_s", "q2_k"), ("q2_k", "q3_k"), ("q3_k_s", "q3_k")])
@pytest.mark.parametrize("kv_heads", [32, 9])
def test_llama_7b_without_grouped_queries(file_type: str, attn_v: str, kv_heads: int) -> None:
    found = tensor_types(file_type, _model(32, 4096, 4096, 11008), layers=32, heads=32, kv_heads=kv_heads)
    assert {found[f"blk.{layer}.attn_v.weight"] for layer in range(32)} == {attn_v}


# Rows of 576 columns are no whole blocks of 256: q2_k, q3_k -> q4_0, q4_k -> q5_0, q5_k -> q5_1, q6_k -> q8_0.
# Rows of ffn_down, 1536 columns, are. File type -> attn_q (and the like), attn_v, attn_output, ffn_down.
SMOLLM2: dict[str, tuple[str, PerLayer, PerLayer, PerLayer]] = {
    "q2_k_s": ("q4_0", "q4_0", "q4_0", ("q4_k", {0, 1, 2}, "q2_k")),
    "q2_k": ("q4_0", "q4_0", "q4_0", "q3_k"),
    "q3_k_s": ("q4_0", "q4_0", "q4_0", "q3_k"),
    "q3_k_m": ("q4_0", ("q5_1", {0, 1}, "q5_0"), "q5_0", ("q5_k", {0}, "q4_k")),
    "q3_k_l": ("q4_0", "q5_1", "q5_1", "q5_k"),
    "q4_k_s": ("q5_0", ("q5_1", {0, 1, 2, 3}, "q5_0"), "q5_0", ("q5_k", {0, 1, 2}, "q4_k")),
    "q4_k_m": ("q5_0", ("q8_0", MORE_30, "q5_0"), "q5_0", ("q6_k", MORE_30, "q4_k")),
    "q5_k_s": ("q5_1", "q5_1", "q5_1", "q5_k"),
    "q5_k_m": ("q5_1", ("q8_0", MORE_30, "q5_1"), "q5_1", ("q6_k", MORE_30, "q5_k")),
    "q6_k": ("q8_0", "q8_0", "q8_0", "q6_k"),
    "q4_0": ("q4_0", "q4_0", "q4_0", "q4_0"),
    "q8_0": ("q8_0", "q8_0", "q8_0", "q8_0"),
    "f16": ("f16", "f16", "f16", "f16"),
}


@pytest.mark.parametrize("file_type", SMOLLM2)
def test_smollm2_135m(file_type: str) -> None:
    base, attn_v, attn_output, ffn_down = SMOLLM2[file_type]
    found = tensor_types(file_type, _model(30, 576, 192, 1536, tied=True), layers=30, heads=9, kv_heads=3)
    # The head, which is the embedding: q6_k has no whole blocks either.
    assert found["token_embd.weight"] == ("f16" if file_type == "f16" else "q8_0")
    _assert_types(
        found,
        30,
        **dict.fromkeys(("attn_q", "attn_k", "ffn_gate", "ffn_up"), base),
        **dict.fromkeys(("attn_norm", "ffn_norm"), "f32"),
        attn_v=attn_v,
        attn_output=attn_output,
        ffn_down=ffn_down,
    )


# File type -> base, attn_output, ffn_down_exps of a model of eight experts.
MIXTRAL: dict[str, tuple[str, str, PerLayer]] = {
    "q2_k_s": ("q2_k", "q2_k", ("q4_k", {0, 1, 2, 3}, "q2_k")),
    "q2_k": ("q2_k", "q5_k", "q3_k"),
    "q3_k_s": ("q3_k", "q5_k", "q3_k"),
    "q3_k_m": ("q3_k", "q5_k", ("q5_k", {0, 1}, "q4_k")),
    "q3_k_l": ("q3_k", "q3_k", "q5_k"),
    "q4_k_s": ("q4_k", "q5_k", ("q5_k", {0, 1, 2, 3}, "q4_k")),
    "q4_k_m": ("q4_k", "q5_k", ("q6_k", MORE_32, "q4_k")),
    "q5_k_s": ("q5_k", "q5_k", "q5_k"),
    "q5_k_m": ("q5_k", "q5_k", ("q6_k", MORE_32, "q5_k")),
    "q6_k": ("q6_k", "q6_k", "q6_k"),
    "q4_0": ("q4_0", "q4_0", "q4_0"),
    "q8_0": ("q8_0", "q8_0", "q8_0"),
}


@pytest.mark.parametrize("file_type", MIXTRAL)
def test_mixtral_8x7b(file_type: str) -> None:
    base, attn_output, ffn_down = MIXTRAL[file_type]
    shapes = _model(32, 4096, 1024, 14336, experts=8)
    found = tensor_types(file_type, shapes, layers=32, heads=32, kv_heads=8, experts=8)
    assert found["output.weight"] == ("q8_0" if file_type == "q8_0" else "q6_k")
    _assert_types(
        found,
        32,
        **dict.fromkeys(("attn_q", "ffn_gate_exps", "ffn_up_exps"), base),
        **dict.fromkeys(("attn_k", "attn_v"), "q8_0"),
        **dict.fromkeys(("attn_norm", "ffn_norm", "ffn_gate_inp"), "f32"),
        attn_output=attn_output,
        ffn_down_exps=ffn_down,
    )


def test_sixteen_bits_of_experts() -> None:
    found = tensor_types("bf16", _model(1, 256, 64, 512, experts=8), layers=1, heads=4, kv_heads=1, experts=8)
    assert {name for name, type_ in found.items() if type_ == "f32"} == {
        "output_norm.weight",
        "blk.0.attn_norm.weight",
        "blk.0.ffn_norm.weight",
        "blk.0.ffn_gate_inp.weight",
    }
    assert set(found.values()) == {"f32", "bf16"}


@pytest.mark.parametrize(
    ("file_type", "imatrix", "first", "rest"),
    [
        ("q4_0", True, "q4_1", "q4_0"),
        ("q5_0", True, "q5_1", "q5_0"),
        ("q5_0", False, "q5_0", "q5_0"),
        ("q4_1", True, "q4_1", "q4_1"),
    ],
)
def test_importance_of_columns(file_type: str, imatrix: bool, first: str, rest: str) -> None:
    shapes = {f"blk.{layer}.ffn_down.weight": (512, 256) for layer in range(16)}
    found = tensor_types(file_type, shapes, layers=16, heads=4, kv_heads=4, imatrix=imatrix)
    assert list(found.values()) == [first] * 2 + [rest] * 14


@pytest.mark.parametrize(("file_type", "attn_v"), [("q3_k_s", "q5_k"), ("q4_k_s", "q5_k"), ("q2_k", "q5_k")])
def test_eighty_layers(file_type: str, attn_v: str) -> None:
    shapes = {"blk.40.attn_v.weight": (1024, 8192), "blk.40.attn_output.weight": (8192, 8192)}
    found = tensor_types(file_type, shapes, layers=80, heads=64, kv_heads=8)
    assert found["blk.40.attn_v.weight"] == attn_v
    assert found["blk.40.attn_output.weight"] == {"q3_k_s": "q3_k", "q4_k_s": "q4_k", "q2_k": "q3_k"}[file_type]
    without = tensor_types("q3_k_s", shapes, layers=80, heads=64, kv_heads=64)
    assert without["blk.40.attn_v.weight"] == "q3_k"


def test_names() -> None:
    shapes: Shapes = {
        "token_embd.weight": (1000, 256),
        "per_layer_token_embd.weight": (1000, 512),
        "rope_freqs.weight": (32,),
        "blk.0.attn_qkv.weight": (768, 256),
        "blk.0.attn_qkv.bias": (768,),
        "blk.0.attn_kv_b.weight": (512, 256),
        "blk.0.attn_q_norm.weight": (4, 64),
        "blk.0.ffn_down_shexp.weight": (256, 512),
        "blk.0.ffn_gate_inp_shexp.weight": (1, 256),
        "blk.0.ffn_up_shexp.weight": (512, 256),
        "blk.0.ssm_conv1d.weight": (512, 4),
        "blk.0.ssm_in.weight": (512, 256),
        "blk.11.attn_v.weight": (512, 256),
    }
    assert tensor_types("q4_k_m", shapes, layers=16, heads=4, kv_heads=4, experts=60) == {
        "token_embd.weight": "q6_k",
        "per_layer_token_embd.weight": "q6_k",
        "rope_freqs.weight": "f32",
        "blk.0.attn_qkv.weight": "q6_k",
        "blk.0.attn_qkv.bias": "f32",
        "blk.0.attn_kv_b.weight": "q6_k",
        "blk.0.attn_q_norm.weight": "f32",
        "blk.0.ffn_down_shexp.weight": "q6_k",
        "blk.0.ffn_gate_inp_shexp.weight": "f32",
        "blk.0.ffn_up_shexp.weight": "q4_k",
        "blk.0.ssm_conv1d.weight": "f32",
        "blk.0.ssm_in.weight": "q4_k",
        "blk.11.attn_v.weight": "q4_k",  # layer 1 would have q6_k
    }


@pytest.mark.parametrize(
    ("file_type", "columns", "head", "matrix"),
    [
        ("q4_k_m", 896, "q8_0", "q5_0"),  # rows of whole blocks of 32 only
        ("q4_k_m", 100, "f16", "f16"),
        ("q6_k", 896, "q8_0", "q8_0"),
        ("q2_k", 896, "q8_0", "q4_0"),
        ("q4_0", 896, "q8_0", "q4_0"),  # the head would be q6_k
        ("q5_1", 512, "q6_k", "q5_1"),
        ("q8_0", 100, "f16", "f16"),
        ("f16", 100, "f16", "f16"),
    ],
)
def test_rows_without_whole_blocks(file_type: str, columns: int, head: str, matrix: str) -> None:
    shapes = {"output.weight": (1000, columns), "blk.0.attn_q.weight": (columns, columns)}
    found = tensor_types(file_type, shapes, layers=24, heads=14, kv_heads=2)
    assert list(found.values()) == [head, matrix]


@pytest.mark.parametrize("name", FILE_TYPES)
def test_numbers_of_file_types(name: str) -> None:
    assert FILE_TYPES[name].ftype == gguf.LlamaFileType[f"MOSTLY_{name.upper()}"]
    assert FILE_TYPES[name].base in {*GGUF_TYPES, "f16", "bf16"}


def test_unknown_file_type() -> None:
    with pytest.raises(UsageError, match="GGUF file type: found 'q7_k'; needed one of q2_k_s, q2_k, "):
        tensor_types("q7_k", {}, layers=1, heads=1, kv_heads=1)


def test_no_torch() -> None:
    code = "import sys, autoround.formats.gguf.recipes; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
