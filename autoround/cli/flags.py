"""From the command line's words to a recipe; the flags are the fields of ``Recipe``."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args

from autoround import __version__
from autoround.cli import refused
from autoround.data.language import did_you_mean
from autoround.errors import UsageError
from autoround.recipe import PRESETS, Option, Recipe, options

DESCRIPTION = "Quantize the weights of a language model by learned rounding."
EPILOG = """\
Every flag may be written with dashes: --group-size. A flag always wins over the recipe of the command:
auto-round, auto-round-best, auto-round-light, auto-round-rtn or auto-round-opt-rtn.

examples:
  auto-round Qwen/Qwen3-0.6B --scheme W4A16
  auto-round-light ./model --bits 2 --group_size 64 --dataset notes.jsonl,python-docs:num=64
  auto-round model.gguf --bits 4 --iters 0 --format "auto_round,auto_gptq" --output_dir out
  auto-round export out.journal --format auto_awq,llm_compressor --output_dir more
"""
# Flags that are no setting of the recipe.
SWITCHES = {
    "dry_run": "print what would be done to every layer, and stop",
    "quiet": "print no progress",
    "debug": "print what is logged, and a traceback when something fails",
}


# Settings of ``auto-round export``.
EXPORT = (
    "model",
    "revision",
    "cache_dir",
    "token",
    "trust_remote_code",
    "format",
    "output_dir",
    "overwrite",
    "max_shard_size",
    "model_dtype",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What the user asked for; with a source, a journal or quantized checkpoint to export and no run."""

    recipe: Recipe
    source: str = ""
    dry_run: bool = False
    quiet: bool = False
    debug: bool = False


def program(preset: str) -> str:
    """Name of the command that runs a named recipe.

    >>> program("default"), program("opt_rtn")
    ('auto-round', 'auto-round-opt-rtn')
    """
    return "auto-round" if preset == "default" else f"auto-round-{preset.replace('_', '-')}"


def spellings() -> dict[str, str]:
    """Every flag without its dashes, in underscores -> the flag it stands for."""
    found = {name: name for name in ("help", "version", *SWITCHES)}
    for name, (_, option) in options().items():
        found |= {spelling: name for spelling in (name, *option["flags"])}
        found |= {spelling: option["off_flags"][0] for spelling in option["off_flags"]}
    return found


def parse(argv: Sequence[str], preset: str) -> Command:
    """Read the words after the command's name.

    Args:
        argv: without the command itself.
        preset: the recipe that the command stands for.

    Raises:
        UsageError: a flag that is unknown or not taken, or a value that cannot be.
        SystemExit: after --help and --version have printed.
    """
    words = _without_subcommand(list(argv))
    if words[:1] == ["export"]:
        return _parse_export(words[1:])
    values = _values(_parser(preset), words, needed="one model")
    settings = {name: values[name] for name in options() if name in values}
    named = values.get("positional")
    if named is not None and settings.setdefault("model", named) != named:
        raise UsageError(f"model: found {named!r} and {settings['model']!r}; needed one")
    if not settings.get("model"):
        raise UsageError(f"model: found none; needed a hub name, folder or .gguf file; try {program(preset)} --help")
    switches = {name: values[name] for name in SWITCHES if name in values}
    return Command(recipe=Recipe.preset(preset, **settings), **switches)


def _parse_export(words: Sequence[str]) -> Command:
    values = _values(_export_parser(), words, needed="one journal or checkpoint")
    if "positional" not in values:
        raise UsageError(
            "export: found nothing to export; needed the folder OUT.journal of a run, or a quantized checkpoint; "
            "try auto-round export --help"
        )
    settings = {name: values[name] for name in EXPORT if name in values}
    switches = {name: values[name] for name in SWITCHES if name in values}
    return Command(recipe=Recipe(**settings), source=values["positional"], **switches)


def _values(parser: argparse.ArgumentParser, words: Sequence[str], *, needed: str) -> dict[str, Any]:
    known = spellings()
    typed, extra = parser.parse_known_args([_canonical(word, known) for word in words])
    if extra:
        raise UsageError(
            f"found {extra[0]!r}, which belongs to no flag; needed {needed}; quote values that have spaces"
        )
    return vars(typed)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def _parser(preset: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program(preset),
        usage="%(prog)s MODEL [flags]",
        description=DESCRIPTION,
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    groups = {option["group"]: parser.add_argument_group(option["group"]) for _, option in options().values()}
    groups["model"].add_argument("positional", metavar="MODEL", nargs="?", help="the same as --model")
    for name, (_, option) in options().items():
        _add_setting(groups[option["group"]], name, preset)
    _add_switches(parser, SWITCHES)
    return parser


def _export_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="auto-round export",
        usage="%(prog)s SOURCE --format LIST --output_dir FOLDER [flags]",
        description="Write formats from the journal of a finished run, or from a quantized checkpoint, code for code.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    group = parser.add_argument_group("export")
    group.add_argument(
        "positional", metavar="SOURCE", nargs="?", help="the folder OUT.journal beside a run's output, or a checkpoint"
    )
    for name in EXPORT:
        _add_setting(group, name, "default")
    _add_switches(parser, [name for name in SWITCHES if name != "dry_run"])
    return parser


def _add_setting(group: argparse._ArgumentGroup, name: str, preset: str) -> None:
    """The flags of a recipe's field."""
    field, option = options()[name]
    kind, text = _kind(field.type), _help(option, PRESETS[preset].get(name, field.default))
    if kind is not bool:
        group.add_argument(f"--{name}", type=READERS.get(kind, str), metavar=_metavar(option, kind), help=text)
        return
    group.add_argument(f"--{name}", action="store_true", help=text)
    for off in option["off_flags"][:1]:
        text = argparse.SUPPRESS if field.default is False else f"the opposite of --{name}"
        group.add_argument(f"--{off}", action="store_false", dest=name, help=text)


def _add_switches(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    command = parser.add_argument_group("command")
    for name in names:
        command.add_argument(f"--{name}", action="store_true", help=SWITCHES[name])
    command.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    command.add_argument("-h", "--help", action="help", help="print this and stop")


def _without_subcommand(words: list[str]) -> list[str]:
    """Intel's command has subcommands of which only "quantize", the usual one, and "help" mean something here."""
    if words[:1] == ["quantize"]:
        return words[1:]
    if words[:1] == ["help"]:
        return ["--help"]
    if words and words[0] in refused.COMMANDS:
        raise UsageError(f"{words[0]}: {refused.COMMANDS[words[0]]}")
    return words


def _canonical(word: str, known: Mapping[str, str]) -> str:
    """A flag in its first spelling; any other word as it is."""
    flag, equals, value = word.partition("=")
    if not flag.startswith("--"):
        return word
    name = flag[2:].replace("-", "_")
    if name in known:
        return f"--{known[name]}{equals}{value}"
    if name in refused.FLAGS:
        raise UsageError(f"{flag}: {refused.FLAGS[name]}")
    advice = did_you_mean(flag, (f"--{each}" for each in known)) or "; --help lists all"
    raise UsageError(f"found unknown flag {flag}{advice}")


def _kind(annotation: object) -> object:
    """A field's type without its None."""
    if isinstance(annotation, UnionType):
        return next(each for each in get_args(annotation) if each is not NoneType)
    return annotation


def _help(option: Option, default: object) -> str:
    notes = []
    if isinstance(default, tuple):
        default = ",".join(default)
    if default is True:
        default = "on"
    if default not in (None, "") and default is not False:
        notes.append(f"default {default}")
    if option["flags"]:
        notes.append(f"also --{', --'.join(option['flags'])}")
    return option["help"] + (f" [{'; '.join(notes)}]" if notes else "")


def _metavar(option: Option, kind: object) -> str:
    if option["choices"]:
        return "|".join(option["choices"])
    return METAVARS.get(kind, "TEXT")


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}; needed a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}; needed a number") from None


def _names(text: str) -> tuple[str, ...]:
    """A comma list, in brackets or not, in lower case and each name once."""
    names = (name.strip().lower() for name in text.strip().removeprefix("[").removesuffix("]").split(","))
    return tuple(dict.fromkeys(name for name in names if name))


READERS: Mapping[object, Callable[[str], object]] = {int: _whole, float: _number, tuple[str, ...]: _names}
METAVARS: Mapping[object, str] = {int: "N", float: "X", tuple[str, ...]: "LIST"}
