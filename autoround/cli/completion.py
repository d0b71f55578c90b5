"""``auto-round completion``: a script that completes commands, flags and files in a shell."""

import argparse
from collections.abc import Mapping
from typing import Any

from autoround.cli.commands import SUBCOMMANDS, find
from autoround.cli.grammar import Grammar
from autoround.errors import UsageError

SHELLS = ("bash", "zsh", "tcsh")
GRAMMAR = Grammar(
    program="auto-round completion",
    usage="bash|zsh|tcsh",
    description="Print a completion script: auto-round completion bash > ~/.local/share/bash-completion/completions/"
    "auto-round, or auto-round completion zsh > a folder of fpath/_auto-round.",
    positional=("SHELL", "bash, zsh or tcsh"),
    needed="bash, zsh or tcsh",
    settings={},
    switches=(),
)


def run(values: Mapping[str, Any]) -> str:
    """The script for a shell.

    Raises:
        UsageError: a shell that is none of them.
    """
    import shtab

    shell = values.get("positional", "")
    if shell not in SHELLS:
        raise UsageError(f"completion: found {shell!r}; needed {', '.join(SHELLS[:-1])} or {SHELLS[-1]}")
    return str(shtab.complete(_parser(), shell=shell))


def _parser() -> argparse.ArgumentParser:
    """All commands in one parser, as shtab wants it."""
    from autoround.cli.quantize import grammar

    parser = grammar("default").parser(positional=False)
    commands = parser.add_subparsers()
    for name, each in SUBCOMMANDS.items():
        commands.add_parser(name, parents=[find(name).GRAMMAR.parser()], help=each.summary, add_help=False)
    return parser
