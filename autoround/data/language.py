"""The dataset mini-language: ``name:num=N:split=a+b:concat=False:system_prompt="…"``, items separated by commas.

Grammar (double quotes protect ``,`` ``:`` ``=`` and outer spaces; ``""`` inside quotes is one quote)::

    specs  := item ("," item)*
    item   := name (":" option)*
    option := "num=" INT | "split=" NAME ("+" NAME)* | "concat" ["=" BOOL] | "apply_chat_template" ["=" BOOL]
            | "system_prompt=" TEXT | "config=" TEXT | "column=" TEXT
    BOOL   := true | false | yes | no | 1 | 0        in any case; the bare option means true
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import NamedTuple

from autoround.errors import UsageError

_BOOLS: Mapping[str, bool] = MappingProxyType(
    {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
)
_FLAGS = ("concat", "apply_chat_template")
_QUOTED = re.compile(r'[,:="]|^\s|\s$|^$')


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec:
    """One item of the mini-language: which dataset, which part of it, and how its documents become rows.

    Args:
        name: a local file, folder or glob, the builtin ``python-docs``, or a dataset name on the hub.
        num: rows to take from this item, at least 1; None shares what the other items leave.
        split: names of the splits to read; None means the usual one.
        concat: True or None packs documents one after another; False keeps one document a row.
        apply_chat_template: True also wraps plain texts as a user's message; False reads chats as plain text;
            None uses the template for chats only.
        system_prompt: system message of every conversation, and turns the template on; "" removes the chat's own.
        config: configuration of a hub dataset.
        column: key or column that holds the text or the chat; None finds it.

    Raises:
        UsageError: a field is out of range or contradicts another.
    """

    name: str
    num: int | None = None
    split: tuple[str, ...] | None = None
    concat: bool | None = None
    apply_chat_template: bool | None = None
    system_prompt: str | None = None
    config: str | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        where = f"dataset {self.name!r}"
        if not self.name:
            raise UsageError("dataset: found an empty name; needed a file, folder, hub name or python-docs")
        if self.num is not None and (isinstance(self.num, bool) or self.num < 1):
            raise UsageError(f"{where}: found num={self.num}; needed a whole number of rows, 1 or more")
        if self.split is not None and (
            not self.split or any(not part or "+" in part or part != part.strip() for part in self.split)
        ):
            raise UsageError(f"{where}: found split={'+'.join(self.split)!r}; needed names joined by '+'")
        for option, value in (("config", self.config), ("column", self.column)):
            if value == "":
                raise UsageError(f"{where}: found an empty {option}; needed a name; leave the option out for the usual")
        if self.system_prompt is not None and self.apply_chat_template is False:
            raise UsageError(f"{where}: system_prompt needs the chat template; drop apply_chat_template=False")


OPTIONS: tuple[str, ...] = tuple(field.name for field in fields(DatasetSpec) if field.name != "name")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word nearest to ``word``, or an empty string."""
    by_fold = {option.casefold(): option for option in known}
    near = difflib.get_close_matches(word.casefold(), by_fold, n=1, cutoff=0.6)
    return f"; did you mean {by_fold[near[0]]!r}?" if near else ""


def parse_specs(text: str) -> tuple[DatasetSpec, ...]:
    """Parse the mini-language.

    Args:
        text: one item or several separated by commas.

    Returns:
        One spec an item, in order; never empty.

    Raises:
        UsageError: an unknown, repeated or malformed option, an empty item, or a quote left open.
    """
    return tuple(_parse_item(item) for item in _split(text))


def format_specs(specs: Sequence[DatasetSpec]) -> str:
    """Write specs as mini-language text; ``parse_specs`` of it gives equal specs back."""
    return ",".join(_format_item(spec) for spec in specs)


def _format_item(spec: DatasetSpec) -> str:
    parts = [_quote(spec.name)]
    texts: dict[str, str | None] = {
        "num": None if spec.num is None else str(spec.num),
        "split": None if spec.split is None else "+".join(spec.split),
        "concat": None if spec.concat is None else str(spec.concat),
        "apply_chat_template": None if spec.apply_chat_template is None else str(spec.apply_chat_template),
        "system_prompt": spec.system_prompt,
        "config": spec.config,
        "column": spec.column,
    }
    parts += [f"{key}={_quote(value)}" for key, value in texts.items() if value is not None]
    return ":".join(parts)


def _quote(value: str) -> str:
    return '"' + value.replace('"', '""') + '"' if _QUOTED.search(value) else value


class _Part(NamedTuple):
    """What stands between two separators: ``key`` or ``key=value``; a value of None had no ``=``."""

    key: str
    value: str | None
    quoted: bool


class _Char(NamedTuple):
    char: str
    quoted: bool


def _characters(text: str) -> list[_Char]:
    """Resolve quotes: every character with whether quotes protect it; an empty character marks empty quotes."""
    found: list[_Char] = []
    inside, position = False, 0
    while position < len(text):
        char = text[position]
        if char != '"':
            found.append(_Char(char, inside))
        elif inside and text[position : position + 2] == '""':
            found.append(_Char('"', True))
            position += 1
        else:
            inside = not inside
            found.append(_Char("", True))
        position += 1
    if inside:
        raise UsageError(f"dataset {text!r}: found a double quote that is never closed; needed a closing one")
    return found


def _split(text: str) -> list[list[_Part]]:
    items: list[list[_Part]] = [[]]
    part: list[_Char] = []
    for char in [*_characters(text), _Char(",", False)]:
        if char == (",", False) or char == (":", False):
            items[-1].append(_part(part))
            part = []
            if char.char == ",":
                items.append([])
        else:
            part.append(char)
    return items[:-1]


def _part(chars: list[_Char]) -> _Part:
    equals = next((index for index, char in enumerate(chars) if char == ("=", False)), None)
    if equals is None:
        return _Part(_stripped(chars), None, any(char.quoted for char in chars))
    value = chars[equals + 1 :]
    return _Part(_stripped(chars[:equals]), _stripped(value), any(char.quoted for char in value))


def _stripped(chars: list[_Char]) -> str:
    first, last = 0, len(chars)
    while first < last and not chars[first].quoted and chars[first].char.isspace():
        first += 1
    while last > first and not chars[last - 1].quoted and chars[last - 1].char.isspace():
        last -= 1
    return "".join(char.char for char in chars[first:last])


def _parse_item(parts: list[_Part]) -> DatasetSpec:
    name, *options = parts
    if name.value is not None:
        raise UsageError(
            f"dataset: found '{name.key}={name.value}' where a name is needed; put the name first "
            "(name:option=value), and in double quotes if it has '=' in it"
        )
    if not name.key:
        raise UsageError("dataset: found an empty item; needed a name between the commas; remove the extra ',' or ':'")
    found: dict[str, _Part] = {}
    for option in options:
        _check_option(name.key, option)
        if option.key in found:
            raise UsageError(f"dataset {name.key!r}: found option {option.key!r} twice; keep one")
        found[option.key] = option
    texts = {key: _text(name.key, part) for key, part in found.items() if key not in _FLAGS}
    return DatasetSpec(
        name=name.key,
        num=_num(name.key, texts["num"]) if "num" in texts else None,
        split=tuple(part.strip() for part in texts["split"].split("+")) if "split" in texts else None,
        concat=_flag(name.key, found.get("concat")),
        apply_chat_template=_flag(name.key, found.get("apply_chat_template")),
        system_prompt=texts.get("system_prompt"),
        config=texts.get("config"),
        column=texts.get("column"),
    )


def _check_option(name: str, option: _Part) -> None:
    if option.key in OPTIONS:
        return
    if option.key.startswith(("\\", "/")):
        hint = f"; a name with ':' in it needs double quotes: '\"{name}:{option.key}\"'"
    elif option.value is None and option.key:
        hint = did_you_mean(option.key, OPTIONS) or f"; a split is written split={option.key}"
    else:
        hint = did_you_mean(option.key, OPTIONS)
    raise UsageError(f"dataset {name!r}: found unknown option {option.key!r}; known are {', '.join(OPTIONS)}{hint}")


def _text(name: str, option: _Part) -> str:
    if option.value is None or (not option.value and not option.quoted):
        raise UsageError(f"dataset {name!r}: found {option.key!r} without a value; write {option.key}=VALUE")
    return option.value


def _num(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,12}", text):
        raise UsageError(f"dataset {name!r}: found num={text}; needed a whole number of rows, 1 or more")
    return int(text)


def _flag(name: str, option: _Part | None) -> bool | None:
    if option is None:
        return None
    if option.value is None:
        return True
    value = _BOOLS.get(option.value.casefold())
    if value is None:
        raise UsageError(
            f"dataset {name!r}: found {option.key}={option.value}; "
            f"needed one of {', '.join(_BOOLS)}, or {option.key} alone"
        )
    return value
