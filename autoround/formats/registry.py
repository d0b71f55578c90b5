"""Names of checkpoint layouts, their rules, and lazy access to the layouts themselves. Torch-free.

Third parties add a layout by an entry point of the group ``autoround.formats`` that names a ``Format`` object.
"""

import difflib
import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from autoround.errors import UsageError
from autoround.formats.rules import RULES
from autoround.plan import FormatRules

if TYPE_CHECKING:
    from autoround.formats.types import Format

ENTRY_POINTS = "autoround.formats"

FORMATS: Mapping[str, str] = MappingProxyType(
    {
        "auto_round": "autoround.formats.auto_round:AUTO_ROUND",
        "auto_round:auto_gptq": "autoround.formats.auto_round:AUTO_ROUND_GPTQ",
        "auto_round:auto_awq": "autoround.formats.auto_round:AUTO_ROUND_AWQ",
        "auto_round:gptqmodel": "autoround.formats.auto_round:AUTO_ROUND_GPTQMODEL",
        "auto_gptq": "autoround.formats.auto_gptq:AUTO_GPTQ",
        "gptq_v2": "autoround.formats.auto_gptq:GPTQ_V2",
        "auto_awq": "autoround.formats.auto_awq:AUTO_AWQ",
        "llm_compressor": "autoround.formats.llm_compressor:LLM_COMPRESSOR",
        "fake": "autoround.formats.fake:FAKE",
    }
)
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "auto_round:gptq": "auto_round:auto_gptq",
        "auto_round:awq": "auto_round:auto_awq",
        "auto_gptq:gptq_v2": "gptq_v2",
        "gptq": "auto_gptq",
        "awq": "auto_awq",
        "compressed-tensors": "llm_compressor",
        **{f"gguf:q{bits}_k": f"gguf:q{bits}_k_m" for bits in (3, 4, 5)},
    }
)
# Names that users of other tools type and that are not here, with what to use.
ABSENT: Mapping[str, str] = MappingProxyType(
    {
        "auto_round:llm_compressor": "llm_compressor",
        "auto_round:fp8": "auto_round with --scheme W8A16",
        "auto_round:mlx": "auto_round",
        "fp8": "auto_round with --scheme W8A16",
        "mlx": "auto_round",
        "svdquant_nunchaku": "auto_round",
        "gguf:q2_k_mixed": "gguf:q2_k",
    }
)


def resolve_name(name: str) -> str:
    """The registered name for what a user typed, in any case and with aliases.

    Raises:
        UsageError: no such layout, or one that this package does not write.

    >>> resolve_name("AWQ")
    'auto_awq'
    """
    typed = name.strip().lower()
    known = available()
    typed = ALIASES.get(typed, typed)
    if typed in known:
        return typed
    if typed in ABSENT:
        raise UsageError(f"format: found {name}, which is not written here; use {ABSENT[typed]}")
    near = difflib.get_close_matches(typed, known, n=1)
    advice = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(f"format: found {name!r}; needed one of {', '.join(known)}{advice}")


def available() -> tuple[str, ...]:
    """Every name of a layout: the package's own, then third parties'."""
    return (*RULES, *(name for name in _third_parties() if name not in RULES))


def rules(form: "str | Format") -> FormatRules:
    """What a layout can hold; neither torch nor the layout is imported for the package's own.

    Raises:
        UsageError: see ``resolve_name``.

    >>> rules("auto_gptq").zero_min
    1
    """
    if isinstance(form, str) and (name := resolve_name(form)) in RULES:
        return RULES[name]
    return get_format(form).rules


def get_format(form: "str | Format") -> "Format":
    """The layout of a folder of safetensors by its name; an object is returned as it is.

    Raises:
        UsageError: see ``resolve_name``.
    """
    if not isinstance(form, str):
        return form
    name = resolve_name(form)
    if name in RULES and RULES[name].file_type:
        raise UsageError(f"format {name}: found a GGUF file; needed a folder of safetensors")
    if name not in FORMATS:
        return cast("Format", _third_parties()[name].load())
    module, _, attribute = FORMATS[name].partition(":")
    return cast("Format", getattr(importlib.import_module(module), attribute))


def _third_parties() -> dict[str, EntryPoint]:
    return {entry.name.lower(): entry for entry in entry_points(group=ENTRY_POINTS)}
