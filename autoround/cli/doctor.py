"""``auto-round doctor``: what this machine has, and what would be fast on it."""

from collections.abc import Mapping
from typing import Any

from autoround.cli.grammar import Grammar

GRAMMAR = Grammar(
    program="auto-round doctor",
    usage="",
    description="Look at devices, dtypes, compilers, libraries and clients of this machine.",
    settings={},
    switches=(),
)


def run(values: Mapping[str, Any]) -> str:
    """The findings, one a line, advice below its finding."""
    from autoround.doctor import examine

    del values
    lines = []
    for topic, found, advice in examine():
        lines += [f"{topic:14} {found}", *([f"{'':14} -> {advice}"] if advice else [])]
    return "\n".join(lines)
