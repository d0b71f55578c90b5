"""The commands: find what is called, run it, turn errors into one message and an exit status."""

import errno
import os
import sys
from collections.abc import Sequence

from autoround.cli import quantize as quantizing
from autoround.cli import refused
from autoround.cli.commands import FAILED, INTERRUPTED, SUBCOMMANDS, Unfinished, find
from autoround.cli.json_lines import JsonLines
from autoround.cli.plan import Foretell
from autoround.cli.quantize import Quantize, program
from autoround.errors import AutoRoundError, UsageError
from autoround.launch import follows

LOG_JSON = frozenset({"--log_json", "--log-json"})
NEXT_STEPS = {
    errno.ENOSPC: "free some space and repeat the command: finished blocks are kept",
    errno.EDQUOT: "free some space and repeat the command: finished blocks are kept",
    errno.EACCES: "change the permissions or the folder",
    errno.EPERM: "change the permissions or the folder",
    errno.EROFS: "choose another folder with --output_dir",
}


def auto_round() -> int:
    """The command ``auto-round``."""
    return main()


def best() -> int:
    """The command ``auto-round-best``: slower, most accurate."""
    return main(preset="best")


def light() -> int:
    """The command ``auto-round-light``: faster."""
    return main(preset="light")


def rtn() -> int:
    """The command ``auto-round-rtn``: round to nearest, without data."""
    return main(preset="rtn")


def opt_rtn() -> int:
    """The command ``auto-round-opt-rtn``: round to nearest, with clips searched on data."""
    return main(preset="opt_rtn")


def evaluate() -> int:
    """The command ``auto-round-eval``: the same as ``auto-round eval``."""
    return main(["eval", *sys.argv[1:]])


def main(
    argv: Sequence[str] | None = None,
    preset: str = "default",
    *,
    quantize: Quantize | None = None,
    foretell: Foretell | None = None,
) -> int:
    """Run a command.

    Args:
        argv: words after the command's name; the process's own when not given.
        preset: the recipe that the command stands for.
        quantize: the engine to use; the package's own when not given.
        foretell: says what a dry run would need; the package's own when not given.

    Returns:
        The exit status: 0, 1 for a failure, 2 for wrong usage, 130 when interrupted.

    Raises:
        SystemExit: after --help and --version have printed.
    """
    words, name = list(sys.argv[1:] if argv is None else argv), program(preset)
    try:
        result, unfinished = _result(words, preset, quantize, foretell)
        if result:
            print(result, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered has no reader any more
        return FAILED
    except (AutoRoundError, OSError) as error:
        if "--debug" in words:
            raise
        return _end(words, f"{name}: error", *_told(error))
    except KeyboardInterrupt:
        return _end(words, name, _stopped(words), INTERRUPTED)
    if unfinished is None:
        return 0
    prefix = name if unfinished.exit_status == INTERRUPTED else f"{name}: error"
    return _end(words, prefix, str(unfinished), unfinished.exit_status)


def _result(
    words: list[str], preset: str, quantize: Quantize | None, foretell: Foretell | None
) -> tuple[str, Unfinished | None]:
    """What stdout shows of the command that was called, and why that is not all."""
    try:
        return _called(words, preset, quantize, foretell), None
    except Unfinished as unfinished:
        return unfinished.shown, unfinished


def _called(words: list[str], preset: str, quantize: Quantize | None, foretell: Foretell | None) -> str:
    first, rest = (words[0], words[1:]) if words else ("", [])
    if first in SUBCOMMANDS:
        if follows(os.environ) and not SUBCOMMANDS[first].shared:  # work for one process
            return ""
        module = find(first)
        return module.run(module.GRAMMAR.read(rest))
    if first in refused.COMMANDS:
        raise UsageError(f"{first}: {refused.COMMANDS[first]}")
    if first == "help":
        words = ["--help"]
    elif first == "quantize":
        words = rest
    elif first == "plan":
        words = [*rest, "--dry_run"]
    return quantizing.run(quantizing.parse(words, preset), quantize, foretell)


def _stopped(words: list[str]) -> str:
    """What is left of a command that was stopped and does not say so itself."""
    if words and words[0] in SUBCOMMANDS:
        return f"stopped; repeat auto-round {words[0]} to begin again"
    anew = " or ".join(word for word in ("--overwrite", "--restart") if word in words)
    again = f"repeat the command without {anew}" if anew else "repeat the command"
    return f"stopped; blocks finished so far are kept: {again} to go on"


def _told(error: AutoRoundError | OSError) -> tuple[str, int]:
    """The one message of an error, and the exit status."""
    if isinstance(error, AutoRoundError):
        return str(error), error.exit_status
    parts = [str(error.filename or ""), error.strerror or str(error)]
    advice = NEXT_STEPS.get(error.errno or 0)
    return ": ".join(part for part in parts if part) + (f"; {advice}" if advice else ""), FAILED


def _end(words: list[str], prefix: str, text: str, status: int) -> int:
    """Say why a command ends early; the exit status."""
    if LOG_JSON.intersection(words):
        JsonLines(sys.stderr).error(text, status)
    else:
        print(f"{prefix}: {text}", file=sys.stderr)
    return status
