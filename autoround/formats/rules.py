"""What every layout of this package and its loaders can hold, known before anything is loaded. Torch-free."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from autoround.formats.gguf.recipes import FILE_TYPES
from autoround.plan import FormatRules

# The configuration names one group size, with exceptions that not every loader reads; kernels know these sizes.
_GPTQ = FormatRules(
    name="auto_gptq",
    group_sizes=(-1, 16, 32, 64, 128, 256, 512, 1024),
    uniform_group=True,
    multiple=32,
    zero_min=1,  # the file stores zero - 1
    scale_dtypes=("float16",),
)
_AWQ = FormatRules(
    name="auto_awq",
    bits=(4,),
    group_sizes=(-1, 16, 32, 64, 128),
    uniform_group=True,
    mixed=False,
    multiple=32,
    scale_dtypes=("float16",),
    linear_only=True,
)
# Loaders take any group size that divides the row, and only multiples of 32.
_AUTO_ROUND = FormatRules(name="auto_round", multiple=32, head=True, whole_experts=True)

RULES: Mapping[str, FormatRules] = MappingProxyType({
    rules.name: rules
    for rules in (
        _AUTO_ROUND,
        replace(_AUTO_ROUND, name="auto_round:auto_gptq", zero_min=1),
        replace(_AWQ, name="auto_round:auto_awq", head=True),
        replace(_AUTO_ROUND, name="auto_round:gptqmodel"),
        _GPTQ,
        replace(_GPTQ, name="gptq_v2", zero_min=0),
        _AWQ,
        # 3 bits have been packed in two ways that no file tells apart.
        FormatRules(
            name="llm_compressor", bits=(2, 4, 8), multiple=32, scale_dtypes=("float16", "bfloat16"), linear_only=True
        ),
        FormatRules(name="fake", head=True, whole_experts=True, any_grid=True),
        *(FormatRules(name=f"gguf:{file_type}", file_type=file_type) for file_type in FILE_TYPES),
    )
})  # fmt: skip
