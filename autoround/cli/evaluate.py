"""``auto-round eval``: measures of a checkpoint of any layout; and of what a run wrote, for ``auto-round --eval``."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoround.cli.commands import FAILED, INTERRUPTED, Unfinished
from autoround.cli.grammar import Grammar, word_or_flag
from autoround.cli.session import session, terminal_width
from autoround.errors import UsageError
from autoround.evaluate.results import FLOAT, Interrupted, Results
from autoround.evaluate.settings import Access, Evaluation
from autoround.launch import follows
from autoround.options import given, settings_of
from autoround.recipe import Recipe

if TYPE_CHECKING:
    from autoround.cli.display import Display
    from autoround.evaluate.run import Prepared

MODEL = ("model", "revision", "cache_dir", "token", "trust_remote_code", "device_map")
NOTHING = "stopped before anything was measured"
GRAMMAR = Grammar(
    program="auto-round eval",
    usage="PATH [--tasks LIST] [--reference MODEL] [flags]",
    description="Measure a model: one of this package's folders, a GGUF file, or any float model.",
    epilog="""\
examples:
  auto-round eval out --reference Qwen/Qwen3-0.6B
  auto-round eval out --tasks mmlu,lambada_openai --limit 100
  auto-round eval m.gguf --reference ./model --tasks kl --eval_output o.json
""",
    positional=("PATH", "the same as --model"),
    needed="one model",
    settings=settings_of(Recipe, MODEL)
    | settings_of(Evaluation, (name for name in settings_of(Evaluation) if name != "eval")),
)


def run(values: Mapping[str, Any]) -> str:
    """Evaluate a model; the table.

    Raises:
        AutoRoundError: no model, or what ``prepare`` and ``evaluate`` raise.
        Unfinished: tasks that failed, or Ctrl-C.
    """
    named = word_or_flag(values, "model")
    if not named:
        raise UsageError("eval: found no model; needed a folder, GGUF file or hub name; try auto-round eval --help")
    recipe = Recipe(**{**given(values, MODEL), "model": named})
    evaluation = evaluation_of(values)
    quiet = "quiet" in values or follows(os.environ)
    with session([*values, *["quiet"] * quiet], named) as screen:
        return evaluate_model(recipe, evaluation, screen, quiet=quiet)


def evaluation_of(values: Mapping[str, Any]) -> Evaluation:
    """The settings of an evaluation among the values of a command."""
    return Evaluation(**given(values, settings_of(Evaluation)))


def access_of(recipe: Recipe) -> Access:
    """How a recipe's model is reached."""
    return Access(
        revision=recipe.revision,
        cache_dir=recipe.cache_dir,
        token=recipe.token,
        trust_remote_code=recipe.trust_remote_code,
    )


def is_quantized(recipe: Recipe) -> bool:
    """Whether a recipe's model is quantized already."""
    from autoround.evaluate import opening

    return opening.is_quantized(recipe.model, access_of(recipe))


def prepare(evaluation: Evaluation, *, reference: bool) -> "Prepared":
    """See ``autoround.evaluate.run.prepare``."""
    from autoround.evaluate import run

    return run.prepare(evaluation, reference=reference)


def evaluate_model(recipe: Recipe, evaluation: Evaluation, screen: "Display", *, quiet: bool) -> str:
    """Evaluate a recipe's model as it is; the table, which the first of several processes alone has.

    Raises:
        Unfinished: tasks that failed, or Ctrl-C.
    """
    try:
        prepared = prepare(evaluation, reference=evaluation.reference is not None)
    except KeyboardInterrupt:
        raise Unfinished("", NOTHING, INTERRUPTED) from None
    results = _measure([recipe.model], prepared, recipe, screen, quiet=quiet)
    return _shown(results, prepared.settings.eval_output)


def evaluate_run(
    folders: Sequence[Path], prepared: "Prepared", recipe: Recipe, screen: "Display", *, quiet: bool
) -> str:
    """Evaluate what a run wrote, beside the model that it was made from if no other is named.

    Returns:
        The folders, one a line, and the table; nothing where another process tells them.

    Raises:
        Unfinished: tasks that failed, or Ctrl-C.
    """
    settings, output = prepared.settings, Path(recipe.output_dir)
    written = "\n".join(map(str, folders))
    beside = output.with_name(f"{output.name}.evaluation.json")
    prepared = prepared._replace(settings=replace(settings, eval_output=settings.eval_output or str(beside)))
    if not quiet:
        screen.note(f"written, and now measured: {', '.join(map(str, folders))}")
    results = _measure([str(folder) for folder in folders], prepared, recipe, screen, quiet=quiet)
    return _shown(results, prepared.settings.eval_output, written)


def _measure(paths: Sequence[str], prepared: "Prepared", recipe: Recipe, screen: "Display", *, quiet: bool) -> Results:
    """The results, those until then if it is stopped."""
    from autoround.evaluate.opening import locate
    from autoround.evaluate.run import evaluate

    settings, access = prepared.settings, access_of(recipe)
    reference = None
    try:
        if settings.reference is not None:
            reference = locate(settings.reference, replace(access, revision=None))
        elif recipe.model not in paths:
            reference = locate(recipe.model, access)
        return evaluate(
            {f"./{path}" if path == FLOAT else path: path for path in paths},
            prepared,
            reference=reference,
            access=access,
            device_map=recipe.device_map,
            tell=None if quiet else screen.note,
            on_progress=None if quiet else screen.update,
        )
    except Interrupted as stopped:
        return stopped.results
    except KeyboardInterrupt:
        return Results(models=(), complete=False)


def _shown(results: Results, output: str | None, before: str = "") -> str:
    """Write the results where they are wanted; the table, below what stdout shows before it.

    Of several processes, the first one alone writes and tells.

    Raises:
        Unfinished: some are missing.
    """
    if follows(os.environ):
        return ""
    done = [f"{', '.join(dict.fromkeys(each.task for each in own.measures))} of {own.name}"
            for own in results.models if own.measures]  # fmt: skip
    if not done and not results.complete:
        raise Unfinished(before, NOTHING, INTERRUPTED)
    names = short_names([each.name for each in results.models if each.name != FLOAT])
    models = tuple(replace(each, name=names.get(each.name, each.name)) for each in results.models)
    shown = "\n\n".join(filter(None, (before, replace(results, models=models).table(terminal_width()))))
    if output is not None:
        try:
            Path(output).write_text(results.json() + "\n", encoding="utf-8")
        except OSError as error:
            raise Unfinished(
                shown, f"{output}: found {error.strerror or error}; the results are not kept", FAILED
            ) from error
    if not results.complete:
        kept = f"; kept in {output}" if output is not None else ""
        raise Unfinished(shown, f"stopped; measured so far: {'; '.join(done)}{kept}", INTERRUPTED)
    if results.failed:
        raise Unfinished(shown, f"found tasks that failed: {'; '.join(results.failed)}", FAILED)
    return shown


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Columns of a table that fits a terminal: the last parts of paths, if they differ.

    >>> short_names(["out/auto_round", "out/fake"])
    {'out/auto_round': 'auto_round', 'out/fake': 'fake'}
    >>> short_names(["a/fake", "b/fake"])
    {'a/fake': 'a/fake', 'b/fake': 'b/fake'}
    """
    names = {path: Path(path).name for path in paths}
    differ = len({*names.values(), "", "float"}) == len(names) + 2
    return names if differ else {path: path for path in paths}
