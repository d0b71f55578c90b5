"""A run's settings as a YAML file: read, checked and written. The names are those of ``Recipe``. Torch-free."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from autoround.data.language import DatasetSpec, did_you_mean, format_specs
from autoround.errors import JournalError, UsageError
from autoround.layers import KEEP, LayerSetting
from autoround.options import settings_of, spellings
from autoround.recipe import Recipe

NAME = "run.yaml"
HEAD = """\
# Settings of one run. Repeat it: auto-round --config {name}
# In Python: autoround.Recipe(**autoround.config.read({name!r}))
"""
# Settings that are never written.
SECRET = frozenset({"token"})


def read(path: str | Path) -> dict[str, Any]:
    """Settings from a YAML file, those that are not null.

    Args:
        path: of the file; its keys are fields of ``Recipe``.

    Returns:
        name -> value, to be given to ``Recipe`` or ``Recipe.preset``.

    Raises:
        UsageError: no such file, no mapping, an unknown key, or a value of another type; names file and key.
    """
    known = settings_of(Recipe)
    found: dict[str, Any] = {}
    for name, value in _mapping(Path(path)).items():
        where = f"{path}: {name}"
        if name not in known:
            other = spellings(known).get(str(name).replace("-", "_"))
            advice = f"; write {other}" if other in known else did_you_mean(str(name), known)
            raise UsageError(f"{where}: found an unknown setting{advice or '; auto-round --help lists all'}")
        if value is not None:
            found[name] = _typed(value, known[name].field.type, where)
    return found


def write(recipe: Recipe, path: Path) -> None:
    """Write the settings that repeat a run, every one spelled out; a token is left out.

    Calibration tokens and texts that were given in memory cannot be written: the file says so.

    Raises:
        JournalError: the disk is full or not writable; a file that was there stays whole.
    """
    import yaml  # type: ignore[import-untyped]

    values = {each.name: _plain(getattr(recipe, each.name)) for each in fields(recipe) if each.name not in SECRET}
    note = ""
    if isinstance(values["dataset"], _InMemory):
        note = "# dataset: was given in memory, so that it is not here\n"
        del values["dataset"]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    _replace(path, HEAD.format(name=path.name) + note + text)


def _replace(path: Path, text: str) -> None:
    """Write under a temporary name, sync, rename."""
    temporary = path.with_name(f"{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        raise JournalError(
            f"{path}: {error.strerror}; needed a writable folder with space; run again when there is: finished blocks "
            "are kept"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class _InMemory:
    """Stands for a value that no text holds."""


def _plain(value: object) -> Any:
    """A setting as YAML's own types."""
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Sequence) and value:
        if all(isinstance(each, DatasetSpec) for each in value):
            return format_specs([each for each in value if isinstance(each, DatasetSpec)])
        if all(isinstance(each, LayerSetting) for each in value):
            return _layers([each for each in value if isinstance(each, LayerSetting)])
    if isinstance(value, tuple) and all(isinstance(each, str) for each in value):
        return list(value)
    return _InMemory()


def _layers(settings: Sequence[LayerSetting]) -> Any:
    if settings[0].flag == "ignore_layers":
        return [each.pattern for each in settings]
    return {each.pattern: KEEP if each.keep else dict(each.changes) for each in settings}


def _mapping(path: Path) -> Mapping[Any, Any]:
    import yaml

    needed = "needed a YAML file of settings, such as `bits: 2`"
    try:
        content = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "no text"
        raise UsageError(f"config: {path}: {cause}; {needed}") from None
    except yaml.YAMLError as error:
        cause = " ".join(str(error).split())
        raise UsageError(f"config: {path}: found no YAML ({cause}); {needed}") from None
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise UsageError(f"config: {path}: found a {type(content).__name__}; {needed}")
    return content


def _typed(value: object, annotation: object, where: str) -> Any:
    """The value as a field's type asks; texts of numbers that YAML does not see as such (5e-3) are numbers."""
    kinds = [each for each in get_args(annotation) if each is not NoneType]
    kind = kinds[0] if isinstance(annotation, UnionType) else annotation
    if get_origin(kind) is Literal:
        kind = str
    if kind not in _CHECKS:
        return value
    needed, convert = _CHECKS[kind]
    try:
        return convert(value)
    except (TypeError, ValueError):
        raise UsageError(f"{where}: found {value!r}; needed {needed}") from None


def _exactly(kind: type) -> Callable[[Any], Any]:
    def check(value: object) -> object:
        if type(value) is not kind:
            raise TypeError
        return value

    return check


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    return float(value)


def _names(value: object) -> tuple[str, ...]:
    found = [each.strip() for each in value.split(",")] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise TypeError
    return tuple(found)


_CHECKS: Mapping[object, tuple[str, Callable[[Any], Any]]] = MappingProxyType(
    {
        int: ("a whole number", _exactly(int)),
        float: ("a number", _number),
        bool: ("true or false", _exactly(bool)),
        str: ("text", _exactly(str)),
        tuple[str, ...]: ("a list of names", _names),
    }
)
