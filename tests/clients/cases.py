"""Folders of tiny models, who loads them, and what they answer where they do not take one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from tests.formats.quantized import tiny_gpt2, tiny_llama

Make = Callable[[], PreTrainedModel]

# Loader and environment -> who that is.
CLIENTS = {
    ("auto_round", "auto-round"): "auto-round 0.16.1",
    ("auto_round", "auto-round-lib"): "auto-round 0.16.1 with auto-round-lib 0.16.0",
    ("transformers", "auto-round"): "transformers 5.23 with compressed-tensors 0.20",
    ("compressed_tensors", "auto-round"): "compressed-tensors 0.20",
    ("gptqmodel", "gptqmodel"): "GPTQModel 7.7",
    ("transformers", "gptqmodel"): "transformers 5.23 with optimum 2.3 and GPTQModel 7.7",
}
BITS, BOTH = (2, 3, 4, 8), (True, False)
# Widths, groups and kept layers of two blocks; q, k and v agree, as do gate and up: some clients run them as one.
MIXED: dict[str, Any] = {
    "layers.0.self_attn.[qkv]_proj": {"bits": 8},
    "layers.1.self_attn": {"bits": 8, "group_size": 16},
    "layers.1.mlp.(gate|up)": {"bits": 2, "group_size": -1},
    "model.layers.1.mlp.down_proj": "keep",
}
MIXED_3, MIXED_SYM = MIXED | {"layers.0.mlp.down": {"bits": 3}}, MIXED | {"layers.0.mlp": {"sym": True}}


@dataclass(frozen=True)
class Case:
    """A folder, and the loader that reads it in an environment with modules whose names begin with ``backend``."""

    loader: str
    form: str
    make: Make = tiny_llama
    settings: dict[str, Any] = field(default_factory=dict)
    backend: str = ""
    environment: str = "auto-round"

    @property
    def cell(self) -> tuple[int, bool] | None:
        """Width and symmetry, where nothing else is set."""
        if self.settings.keys() - {"bits", "sym"}:
            return None
        return self.settings.get("bits", 4), self.settings.get("sym", True)

    @property
    def layout(self) -> str:
        """The format's name; that of the packing where ``auto_round`` chooses it."""
        if self.form != "auto_round":
            return self.form
        if self.settings.get("sym", True):
            return "auto_round:auto_gptq"
        return "auto_round:auto_awq" if self.cell == (4, False) or "head" in self.settings else "auto_round"


class Refusal(NamedTuple):
    """A folder that a client does not take, words of its answer, and what a reader should know."""

    case: Case
    words: str
    note: str = ""


def llama_with_zero_points_of_0() -> PreTrainedModel:
    """Groups without negative weights start at code 0."""
    model = tiny_llama()
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight").abs_()
    return model


_with_bias = partial(tiny_llama, bias=True)
_with_narrow_layers = partial(tiny_llama, intermediate=80)


def _intel(form: str, make: Make = _with_bias, **settings: Any) -> Case:
    """With auto-round alone, which computes with torch."""
    true_zeros = Case("", form, settings=settings).layout in ("auto_round", "auto_round:gptqmodel")
    module = "qlinear_torch" if true_zeros else "qlinear_torch_zp"
    return Case("auto_round", form, make, settings, f"auto_round_extension.torch.{module}")


def _kernels(form: str, make: Make = _with_bias, **settings: Any) -> Case:
    """With auto-round's kernels, which take all widths but 3."""
    module = "auto_round_extension.torch" if settings.get("bits") == 3 else "auto_round_kernel"
    return Case("auto_round", form, make, settings, module, "auto-round-lib")


def _gptqmodel(form: str, make: Make = _with_bias, **settings: Any) -> Case:
    return Case("gptqmodel", form, make, settings, "gptqmodel.nn_modules.qlinear.", "gptqmodel")


def _transformers(form: str, make: Make = _with_bias, **settings: Any) -> Case:
    """With the packages that transformers asks for to read these layouts: optimum and GPTQModel."""
    return Case("transformers", form, make, settings, "gptqmodel.nn_modules.qlinear.", "gptqmodel")


def _compressed(make: Make = _with_bias, **settings: Any) -> Case:
    """Through transformers, whose loader makes ordinary layers of packed ones."""
    return Case("transformers", "llm_compressor", make, settings, "torch.nn.modules.linear")


def _library(make: Make = _with_bias, **settings: Any) -> Case:
    """Through the library itself, layer by layer."""
    return Case("compressed_tensors", "llm_compressor", make, settings)


def _grid(prefix: str, case: Callable[..., Case], *cells: tuple[int, bool]) -> dict[str, Case]:
    return {f"{prefix}-{'sym' if sym else 'asym'}-{bits}": case(bits=bits, sym=sym) for bits, sym in cells}


SYM, ASYM = tuple((bits, True) for bits in BITS), tuple((bits, False) for bits in BITS)
_NOT_3_ASYM = tuple((bits, False) for bits in (2, 4, 8))
_PACKED_CELLS = tuple((bits, sym) for bits in (2, 4, 8) for sym in BOTH)

INTEL = {
    **_grid("intel", partial(_intel, "auto_round"), *SYM),
    **_grid(
        "intel-plain", partial(_intel, "auto_round", llama_with_zero_points_of_0), *((b, False) for b in (2, 3, 8))
    ),
    **_grid("intel-gptqmodel", partial(_intel, "auto_round:gptqmodel"), *SYM),
    **_grid("intel-gptqmodel", partial(_intel, "auto_round:gptqmodel", llama_with_zero_points_of_0), *ASYM),
    **_grid("intel-of-gptq", partial(_intel, "auto_gptq"), *SYM),
    "intel-by-name-of-packing": _intel("auto_round:auto_gptq", bits=8),
    "intel-whole-rows": _intel("auto_round", group_size=-1),
    "intel-mixed-groups": _intel("auto_round", tiny_llama, group_size=64),
    "intel-kept-layers": _intel("auto_round", _with_narrow_layers),
    "intel-tied-conv1d": _intel("auto_round", tiny_gpt2),
    "intel-mixed-bits": _intel("auto_round", tiny_llama, layers=MIXED_3),
    "intel-asym-mixed-bits": _intel("auto_round", tiny_llama, sym=False, layers=MIXED_SYM),
    "intel-gptqmodel-mixed-bits": _intel("auto_round:gptqmodel", tiny_llama, sym=False, layers=MIXED_SYM),
    "intel-quantized-head": _intel("auto_round", lambda: tiny_llama(tied=True), head=True),
    "intel-asym-quantized-head": _intel(
        "auto_round:gptqmodel", tiny_llama, sym=False, head=True, layers={"lm_head": {"bits": 8, "group_size": 16}}
    ),
    "intel-tied-conv1d-quantized-head": _intel("auto_round", tiny_gpt2, head=True),
    "intel-of-gptq-kept-layers": _intel("auto_gptq", _with_narrow_layers, bits=3),
}
KERNELS = {
    **_grid("kernels", partial(_kernels, "auto_round"), *SYM, *ASYM),
    **_grid("kernels-gptq", partial(_kernels, "auto_round:auto_gptq"), *_NOT_3_ASYM),
    **_grid("kernels-awq", partial(_kernels, "auto_round:auto_awq"), (4, True)),
    **_grid("kernels-gptqmodel", partial(_kernels, "auto_round:gptqmodel"), *SYM, *ASYM),
    **_grid("kernels-of-gptq", partial(_kernels, "auto_gptq"), *SYM, *_NOT_3_ASYM),
    **_grid("kernels-of-awq", partial(_kernels, "auto_awq"), (4, True), (4, False)),
    "kernels-awq-asym-points-of-0": _kernels("auto_round", llama_with_zero_points_of_0, sym=False),
}
GPTQMODEL = {
    **_grid("gptqmodel-auto_gptq", partial(_gptqmodel, "auto_gptq"), *SYM),
    **_grid("gptqmodel-gptq_v2", partial(_gptqmodel, "gptq_v2"), *SYM, *ASYM),
    "gptqmodel-points-of-0": _gptqmodel("gptq_v2", llama_with_zero_points_of_0, sym=False),
    "gptqmodel-kept-layers": _gptqmodel("auto_gptq", _with_narrow_layers, bits=3),
    "gptqmodel-mixed-bits": _gptqmodel("auto_gptq", tiny_llama, layers=MIXED_3),
    "gptqmodel-asym-mixed-bits": _gptqmodel("gptq_v2", tiny_llama, sym=False, layers=MIXED_SYM),
    "gptqmodel-awq-sym": _gptqmodel("auto_awq"),
    "gptqmodel-awq-asym-points-of-0": _gptqmodel("auto_awq", llama_with_zero_points_of_0, sym=False),
    "gptqmodel-awq-kept-layers": _gptqmodel("auto_awq", _with_narrow_layers),
    "gptqmodel-fake": Case("gptqmodel", "fake", settings={"bits": 3, "sym": False}, environment="gptqmodel"),
}
TRANSFORMERS = {
    **_grid("transformers-gptq", partial(_transformers, "auto_gptq"), *SYM, *ASYM),
    **_grid("transformers-gptq-v2", partial(_transformers, "gptq_v2"), *SYM, *ASYM),
    "transformers-gptq-kept-layers": _transformers("auto_gptq", _with_narrow_layers),
    "transformers-gptq-layers-kept-in-one-block": _transformers("auto_gptq", layers={"layers.0.mlp": {"bits": 16}}),
    "transformers-gptq-v2-points-of-0": _transformers("gptq_v2", llama_with_zero_points_of_0, sym=False),
    "transformers-awq-sym": _transformers("auto_awq"),
    "transformers-awq-asym-points-of-0": _transformers("auto_awq", llama_with_zero_points_of_0, sym=False),
    "transformers-awq-kept-layers": _transformers("auto_awq", _with_narrow_layers),
    "transformers-fake": Case("transformers", "fake", settings={"bits": 3, "sym": False}),
    "transformers-gptq-fake": Case("transformers", "fake", settings={"bits": 3, "sym": False}, environment="gptqmodel"),
}
COMPRESSED = {
    **_grid("compressed", _compressed, (2, True), (4, True), (8, True)),
    **_grid("library", _library, *_PACKED_CELLS),
    "compressed-whole-rows": _compressed(group_size=-1),
    "compressed-kept-layers": _compressed(_with_narrow_layers),
    "compressed-mixed-bits": _compressed(tiny_llama, layers=MIXED),
    "compressed-bfloat16-scales": _compressed(scale_dtype="bfloat16"),
    "library-mixed-groups": _library(llama_with_zero_points_of_0, group_size=64, sym=False),
    "library-points-of-0": _library(llama_with_zero_points_of_0, sym=False),
    "library-asym-mixed-bits": _library(tiny_llama, sym=False, layers=MIXED_SYM),
}
CASES = INTEL | KERNELS | GPTQMODEL | TRANSFORMERS | COMPRESSED

# What auto-round fails with in a layer of its own that rounds activations, which it uses where no kernel takes a layer.
_NO_KERNEL = "unsupported operand type(s) for +: 'NoneType' and 'str'"
_NO_KERNEL_NOTE = "no kernel takes these, and what stands in for one fails"
_PROJECT_ONLY = "Loading of a sym=False model with format=FORMAT.GPTQ is only supported if produced by gptqmodel"
_SHAPES = "You set `ignore_mismatched_sizes` to `False`, thus raising an error."
_NEEDS_INTEL = "Loading an AutoRound quantized model requires auto-round library"
_NEEDS_COMPRESSED = "compressed-tensors>=0.15.0 is required for compressed-tensors quantization"
_NEEDS_OPTIMUM = "Loading a GPTQ quantized model requires optimum"


def _refused(cases: dict[str, Case], words: str, note: str = "") -> dict[str, Refusal]:
    return {name: Refusal(case, words, note) for name, case in cases.items()}


REFUSED: dict[str, Refusal] = {
    **_refused(
        {
            **_grid("intel-gptq", partial(_intel, "auto_round:auto_gptq"), *ASYM),
            **_grid("intel-awq", partial(_intel, "auto_round:auto_awq"), (4, True), (4, False)),
            **_grid("intel-of-gptq", partial(_intel, "auto_gptq"), *ASYM),
            **_grid("intel-of-awq", partial(_intel, "auto_awq"), (4, True), (4, False)),
            **_grid("kernels-gptq", partial(_kernels, "auto_round:auto_gptq"), (3, False)),
            **_grid("kernels-of-gptq", partial(_kernels, "auto_gptq"), (3, False)),
        },
        _NO_KERNEL,
        _NO_KERNEL_NOTE,
    ),
    **_refused(
        {
            **_grid("intel-of-gptq-v2", partial(_intel, "gptq_v2"), *SYM, *ASYM),
            **_grid("kernels-of-gptq-v2", partial(_kernels, "gptq_v2"), *SYM, *ASYM),
        },
        "Failed to convert gptq format to auto_round format. Only supports `gptqv1`",
        "use `auto_gptq` or `auto_round`",
    ),
    "intel-of-compressed": Refusal(
        Case("auto_round", "llm_compressor"), "Only `gptqv1`, `awq`, and `auto-round` formats are supported"
    ),
    "kernels-of-compressed": Refusal(
        Case("auto_round", "llm_compressor", environment="auto-round-lib"),
        "Only `gptqv1`, `awq`, and `auto-round` formats are supported",
    ),
    **_refused(_grid("gptqmodel-auto_gptq", partial(_gptqmodel, "auto_gptq"), *ASYM), _PROJECT_ONLY, "use `gptq_v2`"),
    **_refused(
        {f"gptqmodel-{form}": _gptqmodel(form) for form in ("auto_round:auto_gptq", "auto_round:auto_awq")}
        | {"gptqmodel-auto_round": _gptqmodel("auto_round", sym=False, bits=2)}
        | {"gptqmodel-auto_round:gptqmodel": _gptqmodel("auto_round:gptqmodel")}
        | {f"transformers-{form}": _transformers(form) for form in ("auto_round:auto_gptq", "auto_round:auto_awq")}
        | {"transformers-auto_round": _transformers("auto_round", sym=False, bits=2)}
        | {"transformers-auto_round:gptqmodel": _transformers("auto_round:gptqmodel")},
        _NEEDS_INTEL,
    ),
    "gptqmodel-compressed": Refusal(_gptqmodel("llm_compressor"), _NEEDS_COMPRESSED),
    "transformers-compressed": Refusal(_transformers("llm_compressor"), _NEEDS_COMPRESSED),
    "transformers-gptq-mixed-bits": Refusal(
        _transformers("auto_gptq", tiny_llama, layers=MIXED), _SHAPES, "optimum does not read the setting `dynamic`"
    ),
    "transformers-gptq-v2-mixed-bits": Refusal(
        _transformers("gptq_v2", tiny_llama, layers=MIXED), _SHAPES, "optimum does not read the setting `dynamic`"
    ),
    **_refused(
        _grid("compressed", _compressed, *_NOT_3_ASYM), _SHAPES, "expects unpacked zero points; the library packs them"
    ),
    "compressed-of-gptq": Refusal(Case("transformers", "auto_gptq"), _NEEDS_OPTIMUM),
    "compressed-of-gptq-v2": Refusal(Case("transformers", "gptq_v2"), _NEEDS_OPTIMUM),
    "compressed-of-awq": Refusal(Case("transformers", "auto_awq"), "Loading an AWQ quantized model requires gptqmodel"),
}
