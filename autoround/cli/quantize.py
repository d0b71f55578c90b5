"""``auto-round`` itself and its recipes: words to a recipe, the run, the folders it wrote."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from autoround import config
from autoround.cli import evaluate
from autoround.cli.commands import SUBCOMMANDS
from autoround.cli.grammar import SWITCHES, Grammar, word_or_flag
from autoround.cli.plan import Foretell, foretold
from autoround.cli.session import session
from autoround.coverage import coverage_table
from autoround.data.language import parse_specs
from autoround.errors import UsageError
from autoround.evaluate.settings import Evaluation
from autoround.intel.adopt import adopt, take
from autoround.launch import follows
from autoround.log import LOGGER
from autoround.options import given, option, settings_of
from autoround.plan import Plan, check_head
from autoround.progress import BlockDone, Progress
from autoround.recipe import PRESETS, Recipe

if TYPE_CHECKING:
    from autoround.cli.display import Display

EPILOG = """\
Every flag may be written with dashes: --group-size. A flag always wins over the
recipe of the command: auto-round, auto-round-best, auto-round-light,
auto-round-rtn or auto-round-opt-rtn.

examples:
  auto-round Qwen/Qwen3-0.6B --scheme W4A16
  auto-round-light ./model --bits 2 --group_size 64 --dataset notes.jsonl:num=64
  auto-round model.gguf --bits 4 --iters 0 --format "auto_round,auto_gptq"
  auto-round plan Qwen/Qwen3-0.6B --format auto_round,gguf:q4_k_m
  auto-round export autoround-output.journal --format auto_awq --output_dir more

other commands, each with a --help of its own:
"""


class Run(Protocol):
    """What the command needs of a planned run: see ``autoround.engine.Run``."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Where settings come from beside the command line."""

    config: str | None = option(
        None, "YAML file of settings, such as the run.yaml in a run's journal; flags win over it", "command"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What the user asked for.

    Attributes:
        recipe: how to quantize.
        quantizes: whether anything was said about that beyond the model and the device.
        evaluation: what to measure afterwards, or at once of a model that is quantized already.
        notes: to tell about flags that are Intel's alone.
    """

    recipe: Recipe
    quantizes: bool = True
    evaluation: Evaluation = Evaluation()  # noqa: RUF009
    notes: tuple[str, ...] = ()
    dry_run: bool = False
    no_probe: bool = False
    quiet: bool = False
    log_json: bool = False
    debug: bool = False
    offline: bool = False


def program(preset: str) -> str:
    """Name of the command that runs a named recipe.

    >>> program("default"), program("opt_rtn")
    ('auto-round', 'auto-round-opt-rtn')
    """
    return "auto-round" if preset == "default" else f"auto-round-{preset.replace('_', '-')}"


def grammar(preset: str) -> Grammar:
    """The words of the command that runs a named recipe."""
    others = "\n".join(f"  auto-round {name:10} {each.summary}" for name, each in SUBCOMMANDS.items())
    return Grammar(
        program=program(preset),
        usage="MODEL [flags]",
        description="Quantize the weights of a language model by learned rounding.",
        epilog=EPILOG + others,
        positional=("MODEL", "the same as --model"),
        needed="one model",
        settings=settings_of(Recipe) | settings_of(Evaluation) | settings_of(Files),
        defaults=PRESETS[preset],
        switches=tuple(SWITCHES),
    )


def parse(words: Sequence[str], preset: str) -> Command:
    """Read the words after the command's name.

    Args:
        words: without the command itself.
        preset: the recipe that the command stands for.

    Raises:
        UsageError: a flag that is unknown or not taken, or a value that cannot be.
        SystemExit: after --help and --version have printed.
    """
    kept, theirs = take(words)
    values = grammar(preset).read(kept)
    settings = given(values, settings_of(Recipe))
    if "config" in values:
        settings = config.read(values["config"]) | settings
    if values.get("positional"):
        settings["model"] = word_or_flag(values, "model")
    if not settings.get("model"):
        raise UsageError(f"model: found none; needed a hub name, folder or .gguf file; try {program(preset)} --help")
    settings, notes = adopt(settings, theirs, preset)
    return Command(
        recipe=Recipe.preset(preset, **settings),
        quantizes=preset != "default" or not set(settings) <= set(evaluate.MODEL),
        evaluation=evaluate.evaluation_of(values),
        notes=notes,
        **given(values, SWITCHES),
    )


def check(recipe: Recipe) -> None:
    """Refuse what can be refused before torch is imported.

    Raises:
        AutoRoundError: a format that cannot hold what is asked, or calibration text that says nothing.
    """
    from autoround.families import split
    from autoround.formats.registry import rules

    for each in split(recipe):
        for name in each.format:
            check_head(each.quant_lm_head, rules(name))
    if recipe.dataset is not None:
        parse_specs(recipe.dataset)


def run(command: Command, quantize: Quantize | None = None, foretell: Foretell | None = None) -> str:
    """Do it, with progress on stderr; the plan, or the folders written, one a line.

    Of the processes that torchrun starts, the first one alone tells.

    Args:
        command: what to do.
        quantize: the engine to use; the package's own when not given.
        foretell: says what a dry run would need; the package's own when not given.

    Raises:
        AutoRoundError: it cannot be done.
        Unfinished: the evaluation was stopped, or tasks failed.
    """
    check(command.recipe)
    follower = follows(os.environ)
    if follower:
        command = replace(command, quiet=True, no_probe=True, notes=())
    with session([name for name in SWITCHES if getattr(command, name)], command.recipe.model) as screen:
        if follower:
            LOGGER.setLevel("ERROR")  # the first process warns
        shown = _run(command, screen, quantize, foretell)
    return "" if follower else shown


def _run(command: Command, screen: "Display", quantize: Quantize | None, foretell: Foretell | None) -> str:
    recipe, evaluation, quiet = command.recipe, command.evaluation, command.quiet
    for note in command.notes:
        screen.note(note)
    if evaluation.wanted and not command.quantizes and (evaluation.eval or evaluate.is_quantized(recipe)):
        return evaluate.evaluate_model(recipe, evaluation, screen, quiet=quiet)
    if command.dry_run:
        return foretold(recipe, probe=not command.no_probe, json=command.log_json, foretell=foretell)
    prepared = evaluate.prepare(evaluation, reference=True) if evaluation.wanted else None
    runs = (quantize or _engine())(recipe.model, recipe, on_progress=None if quiet else screen.update)
    folders = [folder for run in runs for folder in _finish(run, screen, quiet=quiet)]
    if prepared is None:
        return "\n".join(map(str, folders))
    return evaluate.evaluate_run(folders, prepared, recipe, screen, quiet=quiet)


def _engine() -> Quantize:
    from autoround.engine import quantize_each

    return quantize_each


def _finish(run: Run, screen: "Display", *, quiet: bool) -> tuple[Path, ...]:
    """Do a run's work and write its formats; their folders."""
    tokens = []
    for done in run:
        tokens.append((done.path, done.tokens))
        if not quiet:
            screen.block_done(done, len(run.plan.parts))
    if (table := coverage_table(tokens)) and not quiet:
        screen.note(table)
    return run.export()
