"""The subcommands of ``auto-round``.

A subcommand is a module of this package with two names: ``GRAMMAR``, a ``Grammar``, and ``run``, which takes the values
that the grammar read and returns what stdout shows. Its entry here is all that makes it known. Modules are imported
when their command is called, and import torch, if at all, inside ``run``.
"""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, cast

from autoround.cli.grammar import Grammar

FAILED, INTERRUPTED = 1, 130


class Subcommand(NamedTuple):
    """Where a subcommand is, what it does in a few words, and whether processes that torchrun started share it."""

    module: str
    summary: str
    shared: bool = False


class Unfinished(Exception):
    """A command that did a part of its work: it fails, and stdout shows that part."""

    def __init__(self, shown: str, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.shown, self.exit_status = shown, exit_status


class Module(Protocol):
    """What the module of a subcommand has."""

    GRAMMAR: Grammar

    def run(self, values: Mapping[str, Any]) -> str:
        """Do it; the text for stdout, empty for none.

        Raises:
            Unfinished: with what stdout shows of it.
        """


SUBCOMMANDS: Mapping[str, Subcommand] = MappingProxyType(
    {
        "export": Subcommand("autoround.cli.export", "more formats from a journal or checkpoint"),
        "data": Subcommand("autoround.cli.data", "what calibration data holds, with the first rows"),
        "eval": Subcommand("autoround.cli.evaluate", "measures of a checkpoint, beside its float model", shared=True),
        "list": Subcommand("autoround.cli.listing", "names of formats, schemes, datasets or recipes"),
        "doctor": Subcommand("autoround.cli.doctor", "what this machine has, and what would be fast on it"),
        "completion": Subcommand("autoround.cli.completion", "a script that completes flags in your shell"),
    }
)


def find(name: str) -> Module:
    """The module of a subcommand.

    Raises:
        KeyError: there is none of that name.
    """
    return cast(Module, import_module(SUBCOMMANDS[name].module))
