"""Flags and words of Intel's auto-round 0.16 that a command does not take, with what to use instead."""

from collections.abc import Mapping
from types import MappingProxyType

from autoround.intel.words import COMMANDS as COMMANDS
from autoround.intel.words import DEPENDENT, REFUSED, SYNONYMS, TAKEN

# The commands that quantize know what those of them mean that are not refused: see ``autoround.intel.adopt``.
FLAGS: Mapping[str, str] = MappingProxyType({
    **{name: f"leave it out; to auto-round it is {taken.meaning}" for name, taken in TAKEN.items()},
    **{name: f"leave it out; to auto-round it is {meaning}" for name, meaning in DEPENDENT.items()},
    **{name: f"leave it out; to auto-round it is --{meant}" for name, meant in SYNONYMS.items()},
    **REFUSED,
})  # fmt: skip
