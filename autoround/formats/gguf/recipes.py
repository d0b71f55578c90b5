"""Which type each tensor of a GGUF file has, as llama.cpp's quantizer decides (src/llama-quant.cpp). Torch-free.

Falcon, for which llama.cpp has rules of its own, is not covered.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from autoround.errors import UsageError
from autoround.spec import GGUF_TYPES, GgufSpec


class _Place(NamedTuple):
    """What a choice of type depends on."""

    layer: int
    layers: int
    heads: int
    kv_heads: int
    experts: int
    imatrix: bool


Choice: TypeAlias = tuple[Callable[[_Place], bool], str]


def _always(place: _Place) -> bool:
    return True


def _first(layers: int) -> Callable[[_Place], bool]:
    return lambda place: place.layer < layers


def _first_part(parts: int) -> Callable[[_Place], bool]:
    return lambda place: place.layer < place.layers // parts


def _more(place: _Place) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    eighth = place.layers // 8
    return place.layer < eighth or place.layer >= 7 * place.layers // 8 or (place.layer - eighth) % 3 == 2


def _grouped_queries(place: _Place) -> bool:
    return 0 < 4 * place.kv_heads <= place.heads


def _eight_experts(place: _Place) -> bool:
    return place.experts == 8


def _small_values(place: _Place) -> bool:
    """llama.cpp's "70B": Llama and Qwen2, whose value projections are small beside the others."""
    return place.layers == 80 and place.heads != place.kv_heads


def _imatrix_first_eighth(place: _Place) -> bool:
    return place.imatrix and _first_part(8)(place)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileType:
    """A mixture of tensor types, as llama.cpp names it.

    Attributes:
        ftype: llama.cpp's number of the mixture, which the file's ``general.file_type`` holds.
        base: type of the tensors that no choice below concerns.
        output: type of the output head, and of the embedding where the two are one.
        attn_v: types of value projections, queries and keys fused with them included; the first choice that holds
            counts, and the base where none does.
        attn_output: the same for the projections after attention.
        ffn_down: the same for down projections, those of experts included.
    """

    ftype: int
    base: str
    output: str = "q6_k"
    attn_v: tuple[Choice, ...] = ()
    attn_output: tuple[Choice, ...] = ()
    ffn_down: tuple[Choice, ...] = ()


FILE_TYPES: Mapping[str, FileType] = MappingProxyType({
    "q2_k_s": FileType(
        ftype=21, base="q2_k",
        attn_v=((_grouped_queries, "q4_k"),),
        ffn_down=((_first_part(8), "q4_k"),),
    ),
    "q2_k": FileType(
        ftype=10, base="q2_k",
        attn_v=((_grouped_queries, "q4_k"), (_always, "q3_k")),
        attn_output=((_eight_experts, "q5_k"), (_always, "q3_k")),
        ffn_down=((_always, "q3_k"),),
    ),
    "q3_k_s": FileType(ftype=11, base="q3_k", attn_output=((_eight_experts, "q5_k"),)),
    "q3_k_m": FileType(
        ftype=12, base="q3_k",
        attn_v=((_first(2), "q5_k"), (_always, "q4_k")),
        attn_output=((_eight_experts, "q5_k"), (_always, "q4_k")),
        ffn_down=((_first_part(16), "q5_k"), (_always, "q4_k")),
    ),
    "q3_k_l": FileType(
        ftype=13, base="q3_k",
        attn_v=((_always, "q5_k"),),
        attn_output=((_eight_experts, "q3_k"), (_always, "q5_k")),
        ffn_down=((_always, "q5_k"),),
    ),
    "q4_k_s": FileType(
        ftype=14, base="q4_k",
        attn_v=((_first(4), "q5_k"),),
        attn_output=((_eight_experts, "q5_k"),),
        ffn_down=((_first_part(8), "q5_k"),),
    ),
    "q4_k_m": FileType(
        ftype=15, base="q4_k",
        attn_v=((_more, "q6_k"),),
        attn_output=((_eight_experts, "q5_k"),),
        ffn_down=((_more, "q6_k"),),
    ),
    "q5_k_s": FileType(ftype=16, base="q5_k"),
    "q5_k_m": FileType(ftype=17, base="q5_k", attn_v=((_more, "q6_k"),), ffn_down=((_more, "q6_k"),)),
    "q6_k": FileType(ftype=18, base="q6_k"),
    "q4_0": FileType(ftype=2, base="q4_0", ffn_down=((_imatrix_first_eighth, "q4_1"),)),
    "q4_1": FileType(ftype=3, base="q4_1"),
    "q5_0": FileType(ftype=8, base="q5_0", ffn_down=((_imatrix_first_eighth, "q5_1"),)),
    "q5_1": FileType(ftype=9, base="q5_1"),
    "q8_0": FileType(ftype=7, base="q8_0", output="q8_0"),
    "f16": FileType(ftype=1, base="f16", output="f16"),
    "bf16": FileType(ftype=32, base="bf16", output="bf16"),
})  # fmt: skip

# Matrices of whatever shape that stay in float32, beside all that is no matrix.
_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|altup|laurel|per_layer_model_proj|position_embd|token_types"
    r"|ssm_conv1d|shortconv\.conv\.weight|attn_rel_b\.weight|indexer\.[kq]_proj\.weight"
    r"|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight"
)
_EMBEDDINGS = frozenset(("token_embd.weight", "per_layer_token_embd.weight"))
# Parts of a block that have rules, by a piece of their names.
_ROLES = {
    "attn_v.weight": "attn_v",
    "attn_qkv.weight": "attn_v",
    "attn_kv_b.weight": "attn_v",
    "attn_k.weight": "attn_k",
    "attn_output.weight": "attn_output",
    "ffn_down": "ffn_down",
}
_PART = re.compile(rf"blk\.(?P<layer>\d+)\..*?(?P<part>{'|'.join(map(re.escape, _ROLES))})")
# What takes the place of a type in rows that do not split into its blocks of 256.
_FALLBACK = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def tensor_types(
    file_type: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    experts: int = 0,
    imatrix: bool = False,
) -> dict[str, str]:
    """Give every tensor of a file its type.

    Args:
        file_type: one of ``FILE_TYPES``.
        shapes: GGUF name of each tensor -> shape as torch has it: (out, in), (experts, out, in) or (out,). Without
            ``output.weight``, the embedding is the output head as well.
        layers: number of layers of the model.
        heads: attention heads of a layer.
        kv_heads: heads of its keys and values.
        experts: of a mixture of experts; 0 in dense models.
        imatrix: whether the importance of columns was measured.

    Returns:
        Name -> one of ``GGUF_TYPES``, ``f32``, ``f16`` or ``bf16``, in the order of ``shapes``.

    Raises:
        UsageError: another file type.

    >>> shapes = {"blk.0.attn_v.weight": (256, 512), "blk.0.attn_q.weight": (512, 512), "output_norm.weight": (512,)}
    >>> tensor_types("q4_k_m", shapes, layers=8, heads=8, kv_heads=4)
    {'blk.0.attn_v.weight': 'q6_k', 'blk.0.attn_q.weight': 'q4_k', 'output_norm.weight': 'f32'}
    """
    if file_type not in FILE_TYPES:
        raise UsageError(f"GGUF file type: found {file_type!r}; needed one of {', '.join(FILE_TYPES)}")
    recipe = FILE_TYPES[file_type]
    outputs = {"output.weight"} if "output.weight" in shapes else _EMBEDDINGS
    anywhere = _Place(0, layers, heads, kv_heads, experts, imatrix)
    types = {}
    for name, shape in shapes.items():
        if not name.endswith("weight") or math.prod(shape[:-1]) < 2 or _KEPT.search(name):
            types[name] = "f32"
        elif recipe.base not in GGUF_TYPES:
            types[name] = recipe.base
        elif name in outputs:
            types[name] = _fitting(recipe.output, shape[-1])
        else:
            types[name] = _fitting(_choose(recipe, name, anywhere), shape[-1])
    return types


def _choose(recipe: FileType, name: str, anywhere: _Place) -> str:
    """The type of a matrix within a block, whatever its shape."""
    match = _PART.search(name)
    if match is None:
        return recipe.base
    role = _ROLES[match["part"]]
    place = anywhere._replace(layer=int(match["layer"]))
    if role in ("attn_v", "attn_k") and _eight_experts(place):
        return "q8_0"
    choices = {"attn_v": recipe.attn_v, "attn_output": recipe.attn_output, "ffn_down": recipe.ffn_down}.get(role, ())
    chosen = next((name for holds, name in choices if holds(place)), recipe.base)
    lifted = role == "attn_v" and _small_values(place) and chosen in ("q3_k", "q4_k")
    return "q5_k" if lifted else chosen


def _fitting(chosen: str, columns: int) -> str:
    """The type, or what takes its place where rows do not split into its blocks."""
    for candidate in (chosen, _FALLBACK.get(chosen)):
        if candidate and columns % GgufSpec(type=candidate).block_columns == 0:
            return candidate
    return "f16"
