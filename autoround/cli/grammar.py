"""What a command takes, as data, and the reading of its words: flags are the fields of settings dataclasses."""

import argparse
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, NoneType, UnionType
from typing import Any, NoReturn, get_args

from autoround import __version__
from autoround.cli import refused
from autoround.data.language import did_you_mean
from autoround.errors import UsageError
from autoround.options import Option, Setting
from autoround.options import spellings as spellings_of

# Of sentences in the help, which terminals of 80 columns show without a break of their own.
HELP_WIDTH = 79
# Flags that are no setting of anything.
SWITCHES: Mapping[str, str] = MappingProxyType(
    {
        "dry_run": "print the fate of every layer, memory, disk, time and sizes to the byte, and stop; as plan does",
        "no_probe": "with --dry_run: time nothing",
        "quiet": "print no progress",
        "log_json": "print progress, warnings and errors as one JSON object a line",
        "debug": "print what is logged, and a traceback when something fails",
        "offline": "ask no hub: models and data come from the cache alone",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """The words of one command.

    Attributes:
        program: its name, as typed.
        usage: what follows the name in the first line of the help.
        description: one sentence.
        epilog: examples.
        positional: metavariable and help of the one word without a flag; none when empty.
        needed: how an error calls that word.
        settings: fields that have flags.
        defaults: values that take the place of the fields' own defaults in the help.
        switches: names of those of ``SWITCHES`` that the command has.
    """

    program: str
    usage: str
    description: str
    epilog: str = ""
    positional: tuple[str, str] | None = None
    needed: str = "flags alone"
    settings: Mapping[str, Setting]
    defaults: Mapping[str, object] = field(default_factory=dict)
    switches: tuple[str, ...] = ("quiet", "log_json", "debug", "offline")

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """The values of a command's words; what was not given is not there, the positional word is "positional".

        Raises:
            UsageError: a flag that is unknown or not taken, or a value that cannot be.
            SystemExit: after --help and --version have printed.
        """
        known = self.spellings()
        typed, extra = self.parser().parse_known_args([_canonical(word, known) for word in words])
        if extra:
            raise UsageError(
                f"found {extra[0]!r}, which belongs to no flag; needed {self.needed}; quote values that have spaces"
            )
        return vars(typed)

    def spellings(self) -> dict[str, str]:
        """Every flag without its dashes, in underscores -> the flag it stands for."""
        return {name: name for name in ("help", "version", *self.switches)} | spellings_of(self.settings)

    def parser(self, *, positional: bool = True) -> argparse.ArgumentParser:
        """The standard library's parser of these words, without or with the one that has no flag."""
        parser = _Parser(
            prog=self.program,
            usage=f"%(prog)s {self.usage}",
            description=textwrap.fill(self.description, HELP_WIDTH),
            epilog=self.epilog,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        names = dict.fromkeys(setting.option["group"] for setting in self.settings.values())
        groups = {name: parser.add_argument_group(name) for name in names}
        command = groups.get("command") or parser.add_argument_group("command")
        if self.positional and positional:
            metavar, text = self.positional
            next(iter(groups.values()), command).add_argument("positional", metavar=metavar, nargs="?", help=text)
        for name, setting in self.settings.items():
            default = self.defaults.get(name, setting.field.default)
            _add_setting(groups[setting.option["group"]], name, setting, default)
        for name in self.switches:
            command.add_argument(f"--{name}", action="store_true", help=SWITCHES[name])
        command.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
        command.add_argument("-h", "--help", action="help", help="print this and stop")
        return parser


def word_or_flag(values: Mapping[str, Any], name: str) -> Any:
    """What the word without a flag says, or the flag that it stands for; None where neither was given.

    Raises:
        UsageError: both were given, and differ.

    >>> word_or_flag({"positional": "m"}, "model"), word_or_flag({"model": "n"}, "model")
    ('m', 'n')
    """
    word = values.get("positional")
    if word is not None and values.get(name, word) != word:
        raise UsageError(f"{name}: found {word!r} and {values[name]!r}; needed one")
    return values.get(name) if word is None else word


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def _add_setting(group: argparse._ArgumentGroup, name: str, setting: Setting, default: object) -> None:
    """The flags of a field."""
    option, kind = setting.option, _kind(setting.field.type)
    text = _help(option, default)
    if kind is not bool:
        group.add_argument(f"--{name}", type=READERS.get(kind, str), metavar=_metavar(option, kind), help=text)
        return
    group.add_argument(f"--{name}", action="store_true", help=text)
    for off in option["off_flags"][:1]:
        text = argparse.SUPPRESS if setting.field.default is False else f"the opposite of --{name}"
        group.add_argument(f"--{off}", action="store_false", dest=name, help=text)


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
