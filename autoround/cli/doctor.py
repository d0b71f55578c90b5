"""``auto-round doctor``: what this machine has, and what would be fast on it."""

from collections.abc import Mapping
from typing import Any

from autoround.cli.grammar import Grammar
from autoround.cli.session import terminal_width
from autoround.tables import aligned

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
    rows = []
    for topic, found, advice in examine():
        rows += [(topic, found), *([("", f"-> {advice}")] if advice else [])]
    return "\n".join(aligned(rows, terminal_width()))
