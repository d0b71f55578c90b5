"""What every layout of this package and its loaders can hold, known before anything is loaded. Torch-free."""

from collections.abc import Mapping
from types import MappingProxyType

from autoround.plan import FormatRules

RULES: Mapping[str, FormatRules] = MappingProxyType(
    {
        # Loaders take any group size that divides the row, and only multiples of 32.
        "auto_round": FormatRules(name="auto_round", multiple=32),
        # The configuration names one group size; v1 files store zero - 1, and scales as float16.
        "auto_gptq": FormatRules(
            name="auto_gptq",
            group_sizes=(-1, 16, 32, 64, 128, 256, 512, 1024),
            uniform_group=True,
            multiple=32,
            zero_min=1,
            scale_dtypes=("float16",),
        ),
        "fake": FormatRules(name="fake"),
    }
)
