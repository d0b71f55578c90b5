"""The commands: read the command line, run the engine, turn errors into one message and an exit status."""

import errno
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from autoround.cli.flags import Command, parse, program
from autoround.cli.refused import COMMANDS
from autoround.data.language import parse_specs
from autoround.errors import AutoRoundError, UsageError
from autoround.plan import Plan, check_head
from autoround.progress import BlockDone, Progress
from autoround.recipe import Recipe

if TYPE_CHECKING:
    from autoround.cli.display import Display

INTERRUPTED = 130
FAILED = 1
NEXT_STEPS = {
    errno.ENOSPC: "free some space and repeat the command: finished blocks are kept",
    errno.EDQUOT: "free some space and repeat the command: finished blocks are kept",
    errno.EACCES: "change the permissions or the folder",
    errno.EPERM: "change the permissions or the folder",
    errno.EROFS: "choose another folder with --output_dir",
}


class Run(Protocol):
    """What the commands need of a planned run: see ``autoround.engine.Run``."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def plan(self) -> Plan: ...

    def __iter__(self) -> Iterator[BlockDone]: ...

    def export(self) -> tuple[Path, ...]: ...


class Quantize(Protocol):
    """Opens a model and plans its runs: see ``autoround.engine.quantize_each``."""

    def __call__(
        self, model: str, recipe: Recipe, *, on_progress: Callable[[Progress], None] | None = None
    ) -> Sequence[Run]: ...


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
    """The command ``auto-round-eval``, which is not there yet."""
    return _fail("auto-round-eval", UsageError(COMMANDS["eval"]))


def main(argv: Sequence[str] | None = None, preset: str = "default", *, quantize: Quantize | None = None) -> int:
    """Run a command.

    Args:
        argv: words after the command's name; the process's own when not given.
        preset: the recipe that the command stands for.
        quantize: the engine to use; the package's own when not given.

    Returns:
        The exit status: 0, 1 for a failure, 2 for wrong usage, 130 when interrupted.

    Raises:
        SystemExit: after --help and --version have printed.
    """
    words, name = list(sys.argv[1:] if argv is None else argv), program(preset)
    try:
        command = parse(words, preset)
        _check(command.recipe)
        if command.source:
            print("\n".join(map(str, _export(command))))
        else:
            _work(command, quantize or _engine())
    except (AutoRoundError, OSError) as error:
        if "--debug" in words:
            raise
        return _fail(name, error)
    except KeyboardInterrupt:
        again = "repeat the command without --overwrite" if "--overwrite" in words else "repeat the command"
        print(f"{name}: stopped; blocks finished so far are kept: {again} to go on", file=sys.stderr)
        return INTERRUPTED
    return 0


def _check(recipe: Recipe) -> None:
    """Refuse what can be refused before torch is imported."""
    from autoround.families import split
    from autoround.formats.registry import rules

    for each in split(recipe):
        for name in each.format:
            check_head(each.quant_lm_head, rules(name))
    if recipe.dataset is not None:
        parse_specs(recipe.dataset)


def _engine() -> Quantize:
    from autoround.engine import quantize_each

    return quantize_each


def _work(command: Command, quantize: Quantize) -> None:
    """Print the plan, or run it with progress on stderr and print the folders."""
    from autoround.cli.display import display, logged
    from autoround.cli.show import show_plan

    recipe = command.recipe
    with display(sys.stderr) as screen, logged(screen.note, debug=command.debug):
        told = None if command.dry_run or command.quiet else screen.update
        runs = quantize(recipe.model, recipe, on_progress=told)
        if command.dry_run:
            shown = [show_plan(run.plan, ", ".join(run.recipe.format) if len(runs) > 1 else "") for run in runs]
            result = "\n\n".join(shown)
        else:
            result = "\n".join(str(folder) for run in runs for folder in _finish(run, screen, quiet=command.quiet))
    print(result)


def _finish(run: Run, screen: "Display", *, quiet: bool) -> tuple[Path, ...]:
    """Do a run's work and write its formats; their folders."""
    for done in run:
        if not quiet:
            screen.block_done(done, len(run.plan.parts))
    return run.export()


def _export(command: Command) -> tuple[Path, ...]:
    """Write formats from a journal or a quantized checkpoint."""
    from autoround.cli.display import display, logged
    from autoround.export import Target, export_checkpoint, export_journal

    recipe = command.recipe
    target = Target(
        folder=Path(recipe.output_dir),
        formats=recipe.format,
        dtype=recipe.model_dtype,
        max_shard_size=recipe.max_shard_size,
        overwrite=recipe.overwrite,
    )
    with display(sys.stderr) as screen, logged(screen.note, debug=command.debug):

        def tell(name: str, folder: Path) -> None:
            if not command.quiet:
                screen.note(f"export: {name} in {folder}")

        if (Path(command.source) / "config.json").is_file():
            return export_checkpoint(command.source, target, trust_remote_code=recipe.trust_remote_code, on_format=tell)
        return export_journal(command.source, target, model=recipe.model or None, recipe=recipe, on_format=tell)


def _fail(name: str, error: AutoRoundError | OSError) -> int:
    """Print the one message of an error; the exit status."""
    if isinstance(error, AutoRoundError):
        print(f"{name}: error: {error}", file=sys.stderr)
        return error.exit_status
    parts = [str(error.filename or ""), error.strerror or str(error)]
    advice = NEXT_STEPS.get(error.errno or 0)
    text = ": ".join(part for part in parts if part) + (f"; {advice}" if advice else "")
    print(f"{name}: error: {text}", file=sys.stderr)
    return FAILED
