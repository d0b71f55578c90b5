"""Settings for single layers: read from text or a mapping, and found for every path they name. Torch-free."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from autoround.errors import UsageError
from autoround.spec import QuantSpec

KEEP = "keep"
# Settings of a layer and their types.
KNOWN: Mapping[str, type] = {"bits": int, "group_size": int, "sym": bool, "scale_dtype": str}
# Widths that stand for layers that stay as they are.
UNQUANTIZED_BITS = (16, 32)
# What auto-round's users say beside these that says nothing here: weights alone are quantized, to integers.
ACTIVATIONS = "activations stay in 16 bits (their quantization is out of scope)"
INTEGERS = "weights are stored as integers"
_OF_ACTIVATIONS = ("act_group_size", "act_sym", "act_data_type", "act_dynamic")
_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("super_bits", "super_group_size"), "a GGUF file type decides it; name one with --format"),
    "rotation_config": "weights are rounded without a rotation before",
}
# A colon that ends a key, without the space that YAML wants after it.
_TIGHT_COLON = re.compile(r"(?<=[\w\"'$)\]*]):(?=[^\s:])")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSetting:
    """What the layers that a pattern names get.

    Attributes:
        pattern: a path, or a regular expression that is searched for in paths; a number at its end is a whole number.
        changes: fields of ``QuantSpec`` and their values, laid over those of the whole model.
        keep: they stay in 16 bits.
        flag: the option that it was given by.

    >>> LayerSetting(pattern="mlp", changes=(("bits", 8),)).over(QuantSpec(bits=4, group_size=32)).bits
    8
    """

    pattern: str
    changes: tuple[tuple[str, Any], ...] = ()
    keep: bool = False
    flag: Literal["layer_config", "ignore_layers", "device_map"] = "layer_config"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UsageError(
                f"{self.flag}: found {self.pattern!r}, no regular expression ({error}); needed a path or a pattern"
            ) from None

    @property
    def sets_group(self) -> bool:
        """Whether its layers have a group size of their own."""
        return "group_size" in dict(self.changes)

    def names(self, path: str) -> bool:
        """Whether it is about a layer."""
        whole = r"(?!\d)" if self.pattern[-1:].isdigit() else ""
        return path == self.pattern or re.search(f"(?:{self.pattern}){whole}", path) is not None

    def over(self, spec: QuantSpec) -> QuantSpec:
        """The spec with the changes laid over it."""
        return replace(spec, **dict(self.changes))

    def then(self, later: "LayerSetting") -> "LayerSetting":
        """Both in one, of which the later wins."""
        return replace(later, changes=tuple({**dict(self.changes), **dict(later.changes)}.items()))


def read_layer_config(given: object) -> tuple[LayerSetting, ...]:
    """Settings in the order given.

    Args:
        given: a mapping from path or pattern to a scheme name, a mapping of settings, or "keep"; or text of one: JSON,
            YAML or ``{k_proj:{bits:8},.*down:{bits:4}}``; or the name of a file of it; or what this returns.

    Raises:
        UsageError: not such a mapping, an unknown setting, or a value out of range; names the pattern.

    >>> [(each.pattern, each.changes) for each in read_layer_config("{k_proj:{bits:8},.*down:{sym:false}}")]
    [('k_proj', (('bits', 8),)), ('.*down', (('sym', False),))]
    """
    if isinstance(given, str | Path):
        given = read_mapping(str(given).strip()) if str(given).strip() else {}
    if isinstance(given, list | tuple) and all(isinstance(each, LayerSetting) for each in given):
        return tuple(given)
    if not isinstance(given, Mapping):
        raise UsageError(
            f"layer_config: found {given!r}; needed a mapping from layer or pattern to settings, "
            "such as {k_proj: {bits: 8}}"
        )
    return tuple(_setting(str(pattern), value) for pattern, value in given.items())


def read_ignored(given: object) -> tuple[LayerSetting, ...]:
    """Settings that keep layers in 16 bits.

    Args:
        given: comma list of paths, parts of them or patterns; or a sequence of them; or what this returns.

    Raises:
        UsageError: not such a list, or an invalid pattern.

    >>> [each.pattern for each in read_ignored("lm_head, layers.0")]
    ['lm_head', 'layers.0']
    """
    patterns = given.split(",") if isinstance(given, str) else given
    if not isinstance(patterns, Sequence) or not all(isinstance(each, str | LayerSetting) for each in patterns):
        raise UsageError(f"ignore_layers: found {given!r}; needed a comma list of paths, parts of paths or patterns")
    return tuple(
        LayerSetting(pattern=each.strip(), keep=True, flag="ignore_layers") if isinstance(each, str) else each
        for each in patterns
        if not isinstance(each, str) or each.strip()
    )


def assign(
    settings: Sequence[LayerSetting], paths: Sequence[str], others: Sequence[str] = ()
) -> dict[str, LayerSetting]:
    """What every layer gets. The later setting wins, an exact path over patterns, ``ignore_layers`` over all.

    Args:
        settings: in the order given.
        paths: of the layers that may be quantized.
        others: of layers that are not, which settings may keep.

    Returns:
        path -> its settings in one; layers that none names are missing.

    Raises:
        UsageError: one names no layer; tells near matches.

    >>> own = assign(read_layer_config({"0.up": "W8A16", "up": {"bits": 2}}), ["0.up", "1.up"])
    >>> [dict(setting.changes)["bits"] for setting in own.values()]
    [8, 2]
    """
    found: dict[str, LayerSetting] = {}
    known = set(paths)
    for setting in sorted(settings, key=lambda each: (each.flag == "ignore_layers", each.pattern in known)):
        named = [path for path in paths if _concerns(setting, path, known)]
        if not named and not (setting.keep and any(map(setting.names, others))):
            raise UsageError(
                f"{setting.flag}: found {setting.pattern!r}, which names no layer; needed a path such as {paths[0]}, "
                f"or a part or pattern of one{_near(setting.pattern, paths)}"
            )
        for path in named:
            found[path] = found[path].then(setting) if path in found else setting
    return found


def _concerns(setting: LayerSetting, path: str, known: set[str]) -> bool:
    """Whether it is about a layer: one that is a path is about that layer alone."""
    return path == setting.pattern if setting.pattern in known else setting.names(path)


def _near(pattern: str, paths: Iterable[str]) -> str:
    parts = dict.fromkeys(part for path in paths for part in (*path.split("."), path))
    near = difflib.get_close_matches(pattern, [part for part in parts if not part.isdigit()], n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def read_mapping(text: str, *, where: str = "layer_config") -> object:
    """Read JSON, YAML or its relaxed form, from the text itself or from the file it names.

    Args:
        text: begins with a brace, or is the name of a file.
        where: the option that it was given by, for messages.

    Raises:
        UsageError: no such file, or neither JSON nor YAML.

    >>> read_mapping("{k_proj:{bits:8}}")
    {'k_proj': {'bits': 8}}
    """
    if not text.startswith("{"):
        try:
            where, text = f"{where}: {text}", Path(text).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{where}: {error}; needed a JSON or YAML file, or text in braces") from None
    try:
        return json.loads(text)
    except ValueError:
        return _read_yaml(text, where)


def _read_yaml(text: str, where: str) -> object:
    import yaml  # type: ignore[import-untyped]

    try:
        return yaml.safe_load(_TIGHT_COLON.sub(": ", text) if text.startswith("{") else text)
    except yaml.YAMLError as error:
        cause = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
        raise UsageError(
            f"{where}: found text that is neither JSON nor YAML ({cause}); needed such as {{k_proj: {{bits: 8}}}}; "
            "put patterns between single quotes"
        ) from None


def _setting(pattern: str, value: object) -> LayerSetting:
    where = f"layer_config: {pattern}"
    if isinstance(value, str) and value.strip().lower() == KEEP:
        return LayerSetting(pattern=pattern, keep=True)
    try:
        if isinstance(value, str):
            changes = _scheme(value)
        else:
            changes = _checked(_ours(value))
            if changes.get("bits") in UNQUANTIZED_BITS:
                return LayerSetting(pattern=pattern, keep=True)
            changes = {name: getattr(QuantSpec(**changes), name) for name in changes}
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return LayerSetting(pattern=pattern, changes=tuple(changes.items()))


def _ours(value: object) -> dict[Any, Any]:
    """Settings without those of auto-round that say what is so anyway; a scheme is the base of the others."""
    if not isinstance(value, Mapping) or not value:
        raise UsageError(f"found {value!r}; needed a scheme such as W8A16, settings such as {{bits: 8}}, or {KEEP}")
    left = {name: own for name, own in value.items() if own is not None}
    if isinstance(scheme := left.pop("scheme", None), str):
        left = _scheme(scheme) | left
    elif scheme is not None:
        raise UsageError(f"scheme: found {scheme!r}; needed a name such as W8A16")
    bits, data_type = left.pop("act_bits", 16), left.pop("data_type", "int")
    if bits not in UNQUANTIZED_BITS:
        raise UsageError(f"act_bits: found {bits!r}; needed 16: {ACTIVATIONS}")
    if data_type != "int" and left.get("bits") not in UNQUANTIZED_BITS:
        raise UsageError(f"data_type: found {data_type!r}; needed int: {INTEGERS}")
    for name in _REFUSED:
        if name in left:
            raise UsageError(f"{name}: found {left[name]!r}; needed none: {_REFUSED[name]}; leave it out")
    return {name: own for name, own in left.items() if name not in _OF_ACTIVATIONS}


def _scheme(name: str) -> dict[str, Any]:
    spec = QuantSpec.parse(name)
    return {each: getattr(spec, each) for each in ("bits", "group_size", "sym")}


def _checked(value: dict[Any, Any]) -> dict[str, Any]:
    """Known settings of the right types."""
    for name, own in value.items():
        if name not in KNOWN:
            raise UsageError(f"found unknown setting {name!r}; known are {', '.join(KNOWN)}")
        if type(own) is not KNOWN[name]:
            raise UsageError(f"{name}: found {own!r}; needed {_KINDS[KNOWN[name]]}")
    return value


_KINDS: Mapping[type, str] = {int: "a whole number", bool: "true or false", str: "a name"}
