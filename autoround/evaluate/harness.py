"""lm-eval's tasks: found, loaded before any work, and run on a checkpoint of any layout."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from autoround.data.language import did_you_mean
from autoround.errors import DataError, ModelError, UsageError
from autoround.evaluate.opening import locate, open_checkpoint
from autoround.evaluate.results import Measure
from autoround.evaluate.settings import BUILT_IN, Access, Evaluation
from autoround.hub import load
from autoround.model.load import gguf_file
from autoround.ranks import ALONE, Ranks

SHIPPED = Path(__file__).parent / "tasks"
OFFLINE = "python_docs_cloze, python_docs_choice, python_docs_perplexity, kl and perplexity need no network"
# Resamples behind standard errors that have no formula; the error of the error is 2%.
RESAMPLES = 1000


class Tasks(NamedTuple):
    """Loaded tasks of lm-eval.

    Attributes:
        manager: lm-eval's.
        loaded: the name that was asked for -> lm-eval's tasks or groups of that name.
    """

    manager: Any
    loaded: dict[str, list[Any]]


class Outcome(NamedTuple):
    """Measures of the tasks that finished, and why others did not."""

    measures: tuple[Measure, ...] = ()
    failed: Mapping[str, str] = MappingProxyType({})

    def then(self, other: "Outcome") -> "Outcome":
        """Both as one."""
        return Outcome(self.measures + other.measures, {**self.failed, **other.failed})


def load_tasks(names: Sequence[str], include_path: str | None) -> Tasks:
    """Find tasks and load their data.

    Args:
        names: of tasks, groups, tags or task files; with * for several.
        include_path: a folder with task files of the user's own.

    Raises:
        UsageError: no such folder or task.
        DataError: the data of a task cannot be had; names it.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"include_path: found no folder {include_path}; needed one with lm-eval's task files")
    with only_progress(sys.stderr):
        manager = _manager(names, [SHIPPED, *([Path(include_path)] if include_path else [])])
        return Tasks(manager, {name: _load(manager, name) for name in names})


def run_tasks(tasks: Tasks, lm: Any, settings: Evaluation) -> Iterator[Outcome]:
    """Run tasks on a model of lm-eval's interface; what was found, of all at once or of one after another.

    Args:
        tasks: from ``load_tasks``.
        lm: from ``open_lm``.
        settings: limits, shots, and whether tasks are run one after another.

    Raises:
        DataError: lm-eval refuses or fails; with task after task it goes on and the reason is in the outcome.
    """
    if not settings.eval_task_by_task:
        yield Outcome(_run([each for own in tasks.loaded.values() for each in own], tasks, lm, settings), {})
        return
    for name, own in tasks.loaded.items():
        try:
            found = Outcome(_run(own, tasks, lm, settings), {})
        except DataError as error:
            found = Outcome((), {name: str(error)})
        yield found


def check_backend(backend: str) -> None:
    """Refuse a backend that is not installed.

    Raises:
        UsageError: it is not; the message says what to install.
    """
    if backend == "vllm" and find_spec("vllm") is None:
        raise UsageError(
            "eval_backend: found no package vllm; needed it for vllm; `pip install vllm`, or use --eval_backend hf"
        )


def open_lm(path: str | Path, settings: Evaluation, access: Access, device: torch.device, ranks: Ranks = ALONE) -> Any:
    """Load a checkpoint of any layout behind lm-eval's interface.

    Args:
        path: hub name, folder or GGUF file.
        settings: backend, batch size, dtype and whether prompts begin with BOS.
        access: how it is reached.
        device: of the backend hf; vLLM chooses its own.
        ranks: processes that share the requests; of the backend hf.

    Raises:
        AutoRoundError: no such checkpoint, or one that the backend does not take.
    """
    check_backend(settings.eval_backend)
    bos = True if settings.add_bos_token else None
    if settings.eval_backend == "vllm":
        return _open_vllm(path, settings, access, bos)
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]

    opened = open_checkpoint(path, access)
    folder = opened.folder
    assert folder is not None
    source = folder / opened.gguf_file if opened.gguf_file else folder
    model = load(source, dtype=settings.eval_model_dtype, device=device, trust_remote_code=access.trust_remote_code)
    model.requires_grad_(False)

    class Sharing(HFLM):  # type: ignore[misc]
        """One of the processes that share the requests, or the only one."""

        rank, world_size = ranks.rank, ranks.size

        def all_gather(self, tensor: Tensor) -> Tensor:
            return torch.stack(ranks.gather(tensor))

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
            found = ranks.gather(obj)
            return found if ranks.rank == dst else None

        def barrier(self) -> None:
            ranks.gather(None)

    return Sharing(pretrained=model, tokenizer=opened.tokenizer(), batch_size=settings.eval_bs, add_bos_token=bos)


@contextlib.contextmanager
def only_progress(stream: TextIO) -> Iterator[None]:
    """lm-eval prints on stdout, which is for results, and logs what concerns its own command line.

    Args:
        stream: where what it and other libraries print goes.
    """
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            yield
    finally:
        logger.setLevel(before)


def _manager(names: Sequence[str], folders: list[Path]) -> Any:
    """lm-eval's task manager, of these folders alone if they have all: its own takes ten seconds to read."""
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

    own = TaskManager(include_path=folders, include_defaults=False)
    if all(own.match_tasks([name]) or Path(name).is_file() for name in names):
        return own
    return TaskManager(include_path=folders)


def _load(manager: Any, name: str) -> list[Any]:
    matched = [name] if Path(name).is_file() else manager.match_tasks([name])
    if not matched:
        hint = did_you_mean(name, [*BUILT_IN, *manager.all_tasks])
        raise UsageError(f"tasks: found {name!r}; needed kl, perplexity or the name of a task of lm-eval{hint}")
    try:
        found = manager.load(matched)
    except OSError as error:  # a lost connection and missing data sets are errors of this kind
        raise DataError(
            f"task {name}: its data cannot be read or downloaded ({_line(error)}); connect to the network once, or use "
            f"tasks of your own with --include_path; {OFFLINE}"
        ) from error
    except (ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise DataError(f"task {name}: lm-eval cannot load it: {_line(error)}") from error
    groups = [found["groups"][each] for each in matched if each in found["groups"]]
    inside = {task.task_name for group in groups for task in group.get_all_tasks()}
    return [*groups, *(task for key, task in found["tasks"].items() if key not in inside)]


def _run(own: list[Any], tasks: Tasks, lm: Any, settings: Evaluation) -> tuple[Measure, ...]:
    from lm_eval import simple_evaluate  # type: ignore[import-untyped]

    try:
        found = simple_evaluate(
            model=lm,
            tasks=own,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
            task_manager=tasks.manager,
        )
    except (ValueError, RuntimeError, AssertionError, KeyError, OSError) as error:
        raise DataError(f"lm-eval: {_line(error)}") from error
    return measures_of(found["results"]) if found else ()


def measures_of(results: Mapping[str, Mapping[str, Any]]) -> tuple[Measure, ...]:
    """Measures from lm-eval's results.

    >>> [str(each) for each in measures_of({"piqa": {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": 0.1}})]
    ['0.5000 +- 0.1000']
    """
    found = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if not kind or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{name}_stderr,{kind}")
            found.append(
                Measure(
                    task=task,
                    metric=name if kind == "none" else f"{name} ({kind})",
                    value=float(value),
                    error=float(error) if isinstance(error, int | float) else None,
                )
            )
    return tuple(found)


def _open_vllm(path: str | Path, settings: Evaluation, access: Access, bos: bool | None) -> Any:
    if (file := gguf_file(Path(path))) is not None:
        raise UsageError(f"eval_backend: found vllm for {file}; needed a folder of safetensors; use --eval_backend hf")
    try:
        from lm_eval.models.vllm_causallms import VLLM  # type: ignore[import-untyped]
        from lm_eval.utils import simple_parse_args_string  # type: ignore[import-untyped]
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"eval_backend: found a vllm that lm-eval cannot use ({_line(error)}); needed one that fits; "
            "use --eval_backend hf"
        ) from error
    try:
        return VLLM(
            pretrained=os.fspath(locate(path, access)),
            dtype=settings.eval_model_dtype or "auto",
            batch_size=settings.eval_bs,
            add_bos_token=bos,
            trust_remote_code=access.trust_remote_code,
            **simple_parse_args_string(settings.vllm_args),
        )
    except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
        raise ModelError(f"{path}: vLLM refuses it: {_line(error)}; use --eval_backend hf") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
