"""Settings as fields of dataclasses that know their flags; the command line is generated from them. Torch-free."""

from collections.abc import Iterable, Mapping
from dataclasses import Field, field, fields
from typing import Any, NamedTuple, TypedDict, cast

from autoround.errors import UsageError


class Option(TypedDict):
    """What the command line needs to know about a field beside its name, type and default."""

    help: str
    group: str
    flags: tuple[str, ...]
    off_flags: tuple[str, ...]
    choices: tuple[str, ...]


class Setting(NamedTuple):
    """A field of a settings dataclass with its description."""

    field: "Field[Any]"
    option: Option


def option(
    default: Any,
    help: str,
    group: str,
    *flags: str,
    off_flags: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """A field with its flags: the field's own name is always one of them; a secret is not printed."""
    described = Option(help=help, group=group, flags=flags, off_flags=off_flags, choices=choices)
    return field(default=default, metadata=described, repr=not secret)


def settings_of(kind: type, names: Iterable[str] | None = None) -> dict[str, Setting]:
    """The fields of a settings dataclass: all in order, or those of these names.

    Raises:
        KeyError: a name that is no field.
    """
    known = {each.name: Setting(each, cast(Option, each.metadata)) for each in fields(kind)}
    return known if names is None else {name: known[name] for name in names}


def given(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """What was given of these names.

    >>> given({"bits": 4, "quiet": True}, ("bits", "sym"))
    {'bits': 4}
    """
    return {name: values[name] for name in names if name in values}


def spellings(settings: Mapping[str, Setting]) -> dict[str, str]:
    """Every flag without its dashes, in underscores -> the flag it stands for."""
    found: dict[str, str] = {}
    for name, (_, described) in settings.items():
        found |= {spelling: name for spelling in (name, *described["flags"])}
        found |= {spelling: described["off_flags"][0] for spelling in described["off_flags"]}
    return found


def check_choices(settings: object) -> None:
    """Refuse values that are none of their field's choices.

    Raises:
        UsageError: the message names the field and its choices.
    """
    for name, (_, described) in settings_of(type(settings)).items():
        choices, value = described["choices"], getattr(settings, name)
        if choices and value is not None and value not in choices:
            raise UsageError(f"{name}: found {value!r}; needed one of {', '.join(choices)}")
