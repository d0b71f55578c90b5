"""From what Intel's users give to settings of a ``Recipe``, with a note where that should be told. Torch-free."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from autoround.errors import UsageError
from autoround.intel.words import (
    DEPENDENT,
    FORMATS,
    REFUSED,
    SCHEMES,
    SEVERAL_SCHEMES,
    SIGN_ROUND,
    SYNONYMS,
    TAKEN,
)
from autoround.recipe import PRESETS, Recipe

_OURS = Recipe()


class Adopted(NamedTuple):
    """Settings of a recipe, and lines that tell what became of the rest."""

    settings: dict[str, Any]
    notes: tuple[str, ...]


def take(words: Sequence[str]) -> tuple[list[str], dict[str, object]]:
    """Part a command line.

    Args:
        words: without the command's name.

    Returns:
        The words that are left, and the flags that are only Intel's with their values, True for switches.

    Raises:
        UsageError: a flag without its value.

    >>> take(["m", "--nblocks", "1", "--not-use-best-mse", "--bits", "4"])
    (['m', '--bits', '4'], {'nblocks': '1', 'not_use_best_mse': True})
    """
    kept: list[str] = []
    theirs: dict[str, object] = {}
    left = iter(words)
    for word in left:
        flag, equals, value = word.partition("=")
        name = _canonical(flag[2:]) if flag.startswith("--") else ""
        if name not in TAKEN and name not in DEPENDENT:
            kept.append(word)
        elif not takes_value(name):
            theirs[name] = True
        elif equals:
            theirs[name] = value
        else:
            theirs[name] = next(left, None)
            if theirs[name] is None:
                raise UsageError(f"{flag}: expected one argument")
    return kept, theirs


def takes_value(name: str) -> bool:
    """Whether a flag of ``TAKEN`` or ``DEPENDENT`` is more than a switch."""
    return bool(TAKEN[name].values) if name in TAKEN else name != "disable_opt_rtn"


def adopt(settings: Mapping[str, Any], theirs: Mapping[str, object], preset: str = "default") -> Adopted:
    """Settings with what is only Intel's translated.

    Args:
        settings: fields of ``Recipe`` that were given; a scheme and formats may be Intel's.
        theirs: names of ``TAKEN``, ``DEPENDENT`` or ``REFUSED`` and their values.
        preset: the recipe that fills what was not given.

    Raises:
        UsageError: one that is refused; the message says why and what to use.

    >>> adopt({"scheme": "GGUF:Q4_K_M"}, {"nblocks": 1, "not_use_best_mse": True})
    Adopted(settings={'format': ('gguf:q4_k_m',), 'keep': 'last'}, notes=())
    """
    found, notes = _adopt_scheme(dict(settings)), list[str]()
    for name, value in theirs.items():
        meant, note = _meaning(_canonical(name), value, {**PRESETS[preset], **found})
        for field, wanted in meant.items():
            if field != "ignore_layers" and found.setdefault(field, wanted) != wanted:
                raise UsageError(f"--{name}: found {field} {found[field]} beside it; needed {wanted}; leave one out")
        found |= meant
        if note:
            notes.append(f"--{name}: {note}")
    return Adopted(found, tuple(notes))


def _canonical(name: str) -> str:
    name = name.replace("-", "_")
    return SYNONYMS.get(name, name)


def _meaning(name: str, value: object, settings: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The fields that one of their names stands for, and a note.

    Args:
        name: of ``TAKEN``, ``DEPENDENT`` or ``REFUSED``.
        value: True for switches.
        settings: known so far.
    """
    if name in REFUSED:
        raise UsageError(f"--{name}: {REFUSED[name]}")
    if name == "algorithm":
        return _algorithm(str(value)), ""
    if name == "to_quant_block_names":
        return {"ignore_layers": _all_but(value, settings)}, ""
    if name == "disable_opt_rtn":
        if settings.get("iters", _OURS.iters) == 0:
            return {"clip_search": False}, ""
        return {}, "without effect on learned rounding; it is about --iters 0"
    taken = TAKEN[name]
    if taken.values and str(value).lower() not in taken.values:
        raise UsageError(f"--{name}: found {value}; needed {' or '.join(taken.values)}: {taken.instead}")
    return taken.settings, taken.note


def _algorithm(given: str) -> Mapping[str, Any]:
    names = [each.strip().lower() for each in given.split(",") if each.strip()]
    if names == ["rtn"]:
        return {"iters": 0}
    if other := next((name for name in names if name not in SIGN_ROUND), None):
        raise UsageError(
            f"--algorithm: found {other}; needed auto_round or rtn: clips start from a search on activations "
            "(--clip_search), and nothing else is done to weights before they are rounded"
        )
    return {}


def _all_but(blocks: object, settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """Layers to leave as they are so that only some blocks are quantized.

    >>> _all_but("layers.1,layers.2", {})
    ('^(?!.*(?:layers.1(?!\\\\d)|layers.2(?!\\\\d)))',)
    """
    if settings.get("quant_lm_head"):
        raise UsageError("--to_quant_block_names: found --quant_lm_head beside it; needed one of them; leave one out")
    names = blocks.split(",") if isinstance(blocks, str) else [str(each) for each in blocks]  # type: ignore[attr-defined]
    whole = [name.strip() + (r"(?!\d)" if name.strip()[-1:].isdigit() else "") for name in names if name.strip()]
    if not whole:
        raise UsageError("--to_quant_block_names: found no name; needed such as model.layers.0,model.layers.1")
    for name in whole:
        try:
            re.compile(name)
        except re.error as error:
            raise UsageError(f"--to_quant_block_names: found {name!r}, no regular expression ({error})") from None
    given = settings.get("ignore_layers", ())
    return (*(given.split(",") if isinstance(given, str) else given), f"^(?!.*(?:{'|'.join(whole)}))")


def _adopt_scheme(settings: dict[str, Any]) -> dict[str, Any]:
    """A scheme that names a GGUF file type becomes the format; schemes and formats out of scope are refused."""
    name = str(settings.get("scheme", "")).strip().strip("'\"")
    for each in settings.get("format", ()):
        if each in FORMATS:
            raise UsageError(f"format: found {each}; {FORMATS[each]}")
    if name.upper() in SCHEMES:
        raise UsageError(f"scheme: found {name}; {SCHEMES[name.upper()]}")
    if "," in name:
        raise UsageError(f"scheme: found {name}; needed one; several are {SEVERAL_SCHEMES}")
    if not name.upper().startswith("GGUF:"):
        return settings
    from autoround.formats.registry import resolve_name

    file_type = resolve_name(name)
    given = settings.get("format")
    if given is not None and file_type not in map(resolve_name, given):
        raise UsageError(
            f"scheme: found {name} with --format {','.join(given)}; needed the format {file_type}: "
            "only a GGUF file holds what the scheme names; leave --scheme out or name that format"
        )
    return {key: value for key, value in settings.items() if key != "scheme"} | {"format": given or (file_type,)}
