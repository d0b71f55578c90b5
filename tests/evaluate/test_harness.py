"""lm-eval's tasks: which are found, what is said of those that are not, and how they run."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from autoround.errors import DataError, UsageError
from autoround.evaluate import harness
from autoround.evaluate.harness import load_tasks, open_lm, run_tasks
from autoround.evaluate.settings import Access, Evaluation

CPU = torch.device("cpu")
OWN = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: ["yes", "no"]
metric_list:
  - metric: acc
"""
ABSENT = "task: far_away\ndataset_path: nobody/nothing\noutput_type: loglikelihood\ntest_split: test\n"


@pytest.fixture(autouse=True)
def _own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own folder takes ten seconds to read."""
    from lm_eval.tasks import TaskManager

    def made(include_path: Any, include_defaults: bool = True) -> Any:
        del include_defaults
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", made)


def test_tasks_of_the_users_own(tmp_path: Path, float_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data.jsonl").write_text('{"question": "Is it?"}\n{"question": "Was it?"}\n')
    (tmp_path / "mine.yaml").write_text(OWN.format(name="mine", data=tmp_path / "data.jsonl"))
    tasks = load_tasks(["mine"], str(tmp_path))
    settings = Evaluation(tasks="mine", add_bos_token=True)
    lm = open_lm(float_folder, settings, Access(), CPU)
    assert lm.add_bos_token
    (outcome,) = run_tasks(tasks, lm, settings)
    assert [(each.task, each.metric) for each in outcome.measures] == [("mine", "acc")]
    assert outcome.measures[0].value in (0.0, 0.5, 1.0)


def test_a_task_whose_data_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "far.yaml").write_text(ABSENT)
    with pytest.raises(
        DataError, match=r"^task far_away: its data cannot be read or downloaded \(.*nobody/nothing.*python_docs_cloze"
    ):
        load_tasks(["far_away"], str(tmp_path))


def test_tasks_and_folders_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tasks: found 'python_docs_close'; .*did you mean 'python_docs_cloze'"):
        load_tasks(["python_docs_close"], None)
    with pytest.raises(UsageError, match="include_path: found no folder .*absent"):
        load_tasks(["python_docs_cloze"], str(tmp_path / "absent"))


def test_one_after_another_goes_on_after_a_failure(float_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval

    real = lm_eval.simple_evaluate

    def failing(*, tasks: list[Any], **settings: Any) -> Any:
        if tasks[0].task_name == "python_docs_cloze":
            raise RuntimeError("out of\nmemory")
        return real(tasks=tasks, **settings)

    monkeypatch.setattr(lm_eval, "simple_evaluate", failing)
    names = ["python_docs_cloze", "python_docs_choice"]
    settings = Evaluation(tasks=names, eval_task_by_task=True, limit=2)
    lm = open_lm(float_folder, settings, Access(), CPU)
    cloze, choice = run_tasks(load_tasks(names, None), lm, settings)
    assert cloze == ((), {"python_docs_cloze": "lm-eval: out of memory"})
    assert ({each.task for each in choice.measures}, choice.failed) == ({"python_docs_choice"}, {})
    assert cloze.then(choice) == (choice.measures, cloze.failed)
    with pytest.raises(DataError, match="lm-eval: out of memory"):
        list(run_tasks(load_tasks(names, None), lm, Evaluation(tasks=names, limit=2)))


def test_vllm_is_called_or_asked_for(monkeypatch: pytest.MonkeyPatch, float_folder: Path) -> None:
    settings = Evaluation(tasks="python_docs_cloze", eval_backend="vllm")
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="eval_backend: found no package vllm; .*pip install vllm"):
        open_lm(float_folder, settings, Access(), CPU)
