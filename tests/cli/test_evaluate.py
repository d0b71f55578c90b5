"""``auto-round eval`` and ``auto-round --eval``: a tiny model quantized, written and measured."""

import json
import re
from pathlib import Path
from typing import Any

import lm_eval
import pytest

from autoround.cli.evaluate import GRAMMAR
from autoround.cli.main import main
from autoround.cli.quantize import parse
from autoround.evaluate.settings import Evaluation
from autoround.options import settings_of
from tests.evaluate.conftest import float_folder as float_folder
from tests.evaluate.conftest import quantized_folder as quantized_folder

SMALL = "--limit 4 --eval_seqlen 64"


def test_the_command_prints_a_table_and_writes_json(
    float_folder: Path, quantized_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"eval {quantized_folder} --reference {float_folder} --eval_output {tmp_path / 'out.json'} {SMALL}"
    assert main(words.split()) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["task", "metric", "float", quantized_folder.name]
    assert f"evaluation: kl, perplexity of float, {quantized_folder}\n" in err
    assert re.search(rf"^{quantized_folder}, block 2/2  \d\.\d\d GB  \d+:\d\d left$", err, re.MULTILINE)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["reference"] == str(float_folder)
    assert found["models"][str(quantized_folder)]["tasks"]["kl"]["nats per token"]["value"] > 0.1


def test_a_quantized_model_is_measured_and_not_quantized(
    quantized_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"--model {quantized_folder} --eval --tasks perplexity,python_docs_cloze --quiet {SMALL}"
    assert main(line.split()) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows if row][:4] == [
        "task",
        "perplexity",
        "python_docs_cloze",
        "python_docs_cloze",
    ]


def test_a_float_model_is_measured_as_it_is(
    float_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*f"{float_folder} --eval --tasks perplexity --quiet {SMALL}".split()]) == 0
    assert capsys.readouterr().out.split()[:2] == ["task", "metric"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_measures_every_folder_that_it_wrote(
    float_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"{float_folder} --format auto_round,fake --group_size 32 --output_dir {tmp_path / 'out'} --eval --quiet"
    assert main([*line.split(), *SMALL.split()], "rtn") == 0
    folders = [str(tmp_path / "out" / name) for name in ("auto_round", "fake")]
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == [*folders, ""]
    assert out[3].split() == ["task", "metric", "float", "auto_round", "fake"]
    models = json.loads((tmp_path / "out.evaluation.json").read_text())["models"]
    first, second = (models[folder]["tasks"]["kl"]["nats per token"]["value"] for folder in folders)
    assert first == pytest.approx(second, rel=1e-3)
    assert first > 1e-4


class Harness:
    """lm-eval, with tasks that end in an exception."""

    def __init__(self, **failures: BaseException) -> None:
        self.failures, self.real = failures, lm_eval.simple_evaluate

    def __call__(self, *, tasks: list[Any], **settings: Any) -> Any:
        for task in tasks:
            if task.task_name in self.failures:
                raise self.failures[task.task_name]
        return self.real(tasks=tasks, **settings)


def test_a_task_that_fails_is_told_at_the_end_and_by_the_status(
    quantized_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lm_eval, "simple_evaluate", Harness(python_docs_cloze=RuntimeError("out of\nmemory")))
    line = f"eval {quantized_folder} --tasks python_docs_cloze,python_docs_choice --eval_task_by_task {SMALL}"
    assert main([*line.split(), "--eval_output", str(tmp_path / "out.json")]) == 1
    out, err = capsys.readouterr()
    assert "python_docs_choice" in out
    assert out.splitlines()[-1] == f"{quantized_folder}, python_docs_cloze: failed: lm-eval: out of memory"
    assert "python_docs_cloze: failed: lm-eval: out of memory\n" in err
    last = err.splitlines()[-1]
    assert last == f"auto-round: error: found tasks that failed: {quantized_folder}, python_docs_cloze"
    assert json.loads((tmp_path / "out.json").read_text())["failed"] == {
        f"{quantized_folder}, python_docs_cloze": "lm-eval: out of memory"
    }


def test_an_interrupt_says_what_was_done_and_keeps_it(
    quantized_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lm_eval, "simple_evaluate", Harness(python_docs_cloze=KeyboardInterrupt()))
    tasks = "perplexity,python_docs_choice,python_docs_cloze"
    line = f"eval {quantized_folder} --tasks {tasks} --eval_task_by_task {SMALL}"
    file = tmp_path / "out.json"
    assert main([*line.split(), "--eval_output", str(file)]) == 130
    out, err = capsys.readouterr()
    assert [row.split()[0] for row in out.splitlines()[1:3]] == ["perplexity", "python_docs_choice"]
    done = f"perplexity, python_docs_choice of {quantized_folder}; kept in {file}"
    assert err.splitlines()[-1] == f"auto-round: stopped; measured so far: {done}"
    kept = json.loads(file.read_text())
    assert (kept["complete"], len(kept["models"][str(quantized_folder)]["tasks"])) == (False, 2)


@pytest.mark.parametrize("where", ["autoround.evaluate.run.prepare", "autoround.evaluate.run.measure_built_in"])
def test_an_interrupt_before_any_measure_leaves_nothing(
    where: str,
    quantized_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*given: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, stop)
    assert main(["eval", str(quantized_folder), "--eval_output", str(tmp_path / "out.json")]) == 130
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[-1]) == ("", "auto-round: stopped before anything was measured")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_after_a_run_leaves_what_it_wrote(
    float_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lm_eval, "simple_evaluate", Harness(python_docs_cloze=KeyboardInterrupt()))
    line = f"{float_folder} --group_size 32 --output_dir {tmp_path / 'out'} --tasks python_docs_cloze --quiet {SMALL}"
    assert main(line.split(), "rtn") == 130
    assert capsys.readouterr() == (
        f"{tmp_path / 'out'}\n",
        "auto-round-rtn: stopped before anything was measured\n",
    )


def test_a_folder_called_float_is_no_float_model(
    quantized_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "float").symlink_to(quantized_folder)
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "float", "--reference", str(quantized_folder), "--tasks", "kl", *SMALL.split()]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["task", "metric", "./float"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval", "eval: found no model; needed a folder"),
        ("eval m --tasks kl", "kl: found no float model to compare with"),
        ("eval m --limit 0", "limit: found 0.0; needed a positive number"),
        ("eval m --bits 4", "found unknown flag --bits"),
        ("eval m --model n", "model: found 'm' and 'n'; needed one"),
        ("m --tasks kl --vllm_args a=1", "vllm_args: found settings of vLLM; needed --eval_backend vllm"),
    ],
)
def test_wrong_usage(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


def test_what_quantizes_and_what_is_measured() -> None:
    line = "--model q --eval --tasks mmlu,lambada_openai --eval_bs 16 --device 0"
    command = parse(line.split(), "default")
    assert command.evaluation == Evaluation(eval=True, tasks="mmlu,lambada_openai", eval_bs=16)
    assert not command.quantizes
    assert parse(["q", "--eval", "--bits", "4"], "default").quantizes
    assert parse(["q", "--eval"], "rtn").quantizes


def test_help_tells_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: auto-round eval PATH")
    assert [name for name in settings_of(Evaluation) if name != "eval" and f"--{name} " not in text] == []
    assert "eval" not in GRAMMAR.spellings()
