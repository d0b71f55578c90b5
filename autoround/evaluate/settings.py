"""Settings of an evaluation; the command line is generated from them. Torch-free."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from autoround.data.language import parse_specs
from autoround.errors import UsageError
from autoround.options import check_choices, option
from autoround.spec import SCALE_DTYPES

# Tasks that are not lm-eval's: block by block, against the float model.
BUILT_IN = ("kl", "perplexity")
# Rows of text that they take.
ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How models are reached: branch, cache and token for those of the hub, and whether their own code may run."""

    revision: str | None = None
    cache_dir: str | None = None
    token: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What is measured, and how.

    Raises:
        UsageError: a value out of its range; the message names the field.

    >>> Evaluation(tasks="kl, python_docs_cloze").tasks
    ('kl', 'python_docs_cloze')
    """

    # fmt: off
    eval: bool = option(
        False, "evaluate what was written; the model as it is where no option asks to quantize it", "evaluation")
    tasks: Any = option(
        (), "comma list: kl, perplexity, python_docs_cloze, python_docs_choice, python_docs_perplexity and lm-eval's; "
        "kl,perplexity when unset", "evaluation", "task")
    reference: str | None = option(
        None, "the float model beside it; of a run, the model that was quantized when unset", "evaluation")
    eval_float: bool | None = option(
        None, "score the float model on lm-eval's tasks too; on if --reference is given when unset", "evaluation",
        off_flags=("no_eval_float",))
    eval_backend: Literal["hf", "vllm"] = option(
        "hf", "what runs lm-eval's tasks", "evaluation", choices=("hf", "vllm"))
    vllm_args: str | None = option(
        None, "settings of vLLM, as tensor_parallel_size=2,gpu_memory_utilization=0.8", "evaluation")
    eval_bs: int = option(8, "rows in a forward", "evaluation")
    eval_model_dtype: str | None = option(
        None, "dtype to compute in; float32 for kl and perplexity, else the checkpoint's own when unset", "evaluation",
        choices=tuple(SCALE_DTYPES))
    limit: float | None = option(
        None, "examples of each task, or a share of them below 1; from 1 on, rows of kl and perplexity too, else 64",
        "evaluation")
    num_fewshot: int | None = option(None, "examples in the prompt; the task's own number when unset", "evaluation")
    add_bos_token: bool = option(False, "begin every prompt of lm-eval's tasks with the BOS token", "evaluation")
    eval_task_by_task: bool = option(
        False, "one task after another: each is told when it is done, and one that fails does not stop the others",
        "evaluation")
    include_path: str | None = option(None, "folder with lm-eval task files of your own", "evaluation")
    eval_dataset: str = option(
        "python-docs:split=test", "text of kl and perplexity, as for --dataset", "evaluation")
    eval_seqlen: int = option(512, "tokens in its rows", "evaluation")
    eval_output: str | None = option(
        None, "file for the results as JSON; of a run OUT.evaluation.json when unset", "evaluation")
    # fmt: on

    def __post_init__(self) -> None:
        for name, least in (("eval_bs", 1), ("eval_seqlen", 2), ("num_fewshot", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name}: found {value}; needed at least {least}")
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise UsageError(f"limit: found {self.limit}; needed a positive number")
        if self.vllm_args is not None and self.eval_backend != "vllm":
            raise UsageError("vllm_args: found settings of vLLM; needed --eval_backend vllm; add it, or leave them out")
        object.__setattr__(self, "tasks", _names(self.tasks))
        check_choices(self)
        parse_specs(self.eval_dataset)
        if self.eval_model_dtype is not None:
            object.__setattr__(self, "eval_model_dtype", SCALE_DTYPES[self.eval_model_dtype])

    @property
    def wanted(self) -> bool:
        """Whether anything is to be evaluated."""
        return self.eval or bool(self.tasks)

    def built_in(self, *, reference: bool) -> tuple[str, ...]:
        """The tasks that are run block by block.

        Args:
            reference: whether there is a float model to compare with.

        >>> Evaluation().built_in(reference=True), Evaluation(tasks="piqa").built_in(reference=True)
        (('kl', 'perplexity'), ())
        """
        if not self.tasks:
            return BUILT_IN if reference else ("perplexity",)
        return tuple(name for name in self.tasks if name in BUILT_IN)

    @property
    def lm_eval(self) -> tuple[str, ...]:
        """The tasks of lm-eval."""
        return tuple(name for name in self.tasks if name not in BUILT_IN)

    @property
    def rows(self) -> int:
        """Of text for kl and perplexity.

        >>> Evaluation().rows, Evaluation(limit=8).rows, Evaluation(limit=0.5).rows
        (64, 8, 64)
        """
        return int(self.limit) if self.limit is not None and self.limit >= 1 else ROWS

    @property
    def scores_float(self) -> bool:
        """Whether lm-eval's tasks are run on the float model too."""
        return self.reference is not None if self.eval_float is None else self.eval_float


def _names(tasks: Any) -> tuple[str, ...]:
    """Names from a comma list, in brackets or not, or from a sequence; each once."""
    parts = tasks.strip().removeprefix("[").removesuffix("]").split(",") if isinstance(tasks, str) else tasks
    return tuple(dict.fromkeys(name for part in parts if (name := str(part).strip())))
