"""``auto-round eval`` and ``auto-round --eval``: a tiny model quantized, written and measured."""

import json
import re
from pathlib import Path

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
