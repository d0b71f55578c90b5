"""An evaluation from settings to results: built-in measures block by block, then lm-eval's tasks."""

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

from autoround.backends.base import of_rank, select_all
from autoround.errors import UsageError
from autoround.evaluate.built_in import BuiltIn, measure_built_in
from autoround.evaluate.harness import Outcome, Tasks, check_backend, load_tasks, only_progress, open_lm, run_tasks
from autoround.evaluate.opening import open_checkpoint
from autoround.evaluate.results import FLOAT, Interrupted, ModelResults, Results
from autoround.evaluate.settings import Access, Evaluation
from autoround.evaluate.stream import Streaming
from autoround.launch import launched
from autoround.progress import Progress
from autoround.ranks import Ranks, join


class Prepared(NamedTuple):
    """An evaluation whose settings are checked and whose tasks are loaded.

    Attributes:
        settings: what is measured.
        built_in: the tasks that are run block by block.
        tasks: those of lm-eval; None where there are none.
    """

    settings: Evaluation
    built_in: tuple[str, ...]
    tasks: Tasks | None


def prepare(settings: Evaluation, *, reference: bool) -> Prepared:
    """Refuse what cannot work, and load the tasks, before any model is.

    Args:
        settings: what is measured.
        reference: whether there will be a float model to compare with.

    Raises:
        UsageError: kl without one, no such task, or a backend that is not installed.
        DataError: the data of a task cannot be had.
    """
    built_in = settings.built_in(reference=reference)
    if "kl" in built_in and not reference:
        raise UsageError("kl: found no float model to compare with; needed one; add --reference MODEL")
    output = settings.eval_output
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise UsageError(f"eval_output: found no folder {Path(output).parent}; needed one that exists")
    if output is not None and Path(output).is_dir():
        raise UsageError(f"eval_output: found the folder {output}; needed a file, such as {Path(output) / 'eval.json'}")
    if not settings.lm_eval:
        return Prepared(settings, built_in, None)
    check_backend(settings.eval_backend)
    return Prepared(settings, built_in, load_tasks(settings.lm_eval, settings.include_path))


def evaluate(
    checkpoints: Mapping[str, str | Path],
    prepared: Prepared,
    *,
    reference: str | Path | None = None,
    access: Access = Access(),  # noqa: B008
    device_map: str = "auto",
    tell: Callable[[str], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Results:
    """Measure checkpoints of any layout; processes that torchrun started share the text and the tasks of Hugging Face.

    Args:
        checkpoints: name -> hub name, folder or GGUF file.
        prepared: from ``prepare``.
        reference: the float model.
        access: how models are reached.
        device_map: as on the command line.
        tell: called with a line when something begins; without it lm-eval shows no progress either.
        on_progress: called with the blocks of kl and perplexity.

    Raises:
        Interrupted: by Ctrl-C; it has what was finished.
        AutoRoundError: a checkpoint that cannot be opened, other vocabularies, text that cannot be read, or tasks of
            fewer questions than processes.
    """
    settings = prepared.settings
    scored = dict(checkpoints)
    if reference is not None and settings.scores_float:
        scored = {FLOAT: reference, **checkpoints}
    found, outcomes = BuiltIn("", {}, {}), dict.fromkeys((FLOAT, *checkpoints), Outcome())
    try:
        backend, devices = select_all(device_map)
        launch = launched(os.environ)
        device, ranks = of_rank(backend, devices, launch)[0], join(launch, backend.name)
        runs_tasks = _runs_tasks(prepared, ranks)
        if prepared.built_in:
            found = measure_built_in(
                prepared.built_in,
                {name: open_checkpoint(path, access) for name, path in checkpoints.items()},
                settings,
                reference=None if reference is None else open_checkpoint(reference, access),
                streaming=Streaming(
                    batch_size=settings.eval_bs,
                    device=device,
                    dtype=getattr(torch, settings.eval_model_dtype or "float32"),
                    memory=backend.memory_bytes,
                    ranks=ranks,
                ),
                tell=tell or _silent,
                on_progress=on_progress,
            )
        for name, path in scored.items() if runs_tasks else ():
            for outcome in _run_tasks(name, path, prepared, access=access, device=device, ranks=ranks, tell=tell):
                outcomes[name] = outcomes[name].then(outcome)
    except KeyboardInterrupt:
        raise Interrupted(replace(_results(found, outcomes, reference, settings), complete=False)) from None
    return _results(found, outcomes, reference, settings)


def _results(
    found: BuiltIn, outcomes: Mapping[str, Outcome], reference: str | Path | None, settings: Evaluation
) -> Results:
    measures = {name: (*found.measures.get(name, ()), *each.measures) for name, each in outcomes.items()}
    return Results(
        models=tuple(
            ModelResults(name=name, measures=own, worst=found.worst.get(name, ()))
            for name, own in measures.items()
            if own or name != FLOAT
        ),
        reference=str(reference or ""),
        text=found.text,
        failed={f"{name}, {task}": why for name, each in outcomes.items() for task, why in each.failed.items()},
        settings=asdict(settings),
    )


def _runs_tasks(prepared: Prepared, ranks: Ranks) -> bool:
    """Whether this process runs tasks; vLLM is started by the first one alone."""
    settings = prepared.settings
    if prepared.tasks is None or (settings.eval_backend == "vllm" and ranks.rank):
        return False
    if settings.limit is not None and 1 <= settings.limit < ranks.size:
        raise UsageError(f"limit: found {settings.limit} questions for {ranks.size} processes; needed one for each")
    return True


def _run_tasks(
    name: str,
    path: str | Path,
    prepared: Prepared,
    *,
    access: Access,
    device: torch.device,
    ranks: Ranks,
    tell: Callable[[str], None] | None,
) -> Iterator[Outcome]:
    """lm-eval's tasks on one model, which is gone afterwards."""
    tasks, settings, say = prepared.tasks, prepared.settings, tell or _silent
    assert tasks is not None
    say(f"evaluation: {', '.join(tasks.loaded)} of {name}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_progress(sys.stderr if tell else stack.enter_context(open(os.devnull, "w"))))
        for outcome in run_tasks(tasks, open_lm(path, settings, access, device, ranks), settings):
            if settings.eval_task_by_task:
                for each in outcome.measures:
                    say(f"{each.task}  {each.metric}  {each}")
                for task, reason in outcome.failed.items():
                    say(f"{task}: failed: {reason}")
            yield outcome
    gc.collect()


def _silent(line: str) -> None:
    del line
