"""``auto-round data`` on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autoround.cli import data
from autoround.cli.main import main
from autoround.errors import AutoRoundError, UsageError
from tests.data.words import make_tokenizer, words, write_records
from tests.fakehub import FakeHub
from tests.model.processors import save, write_rows
from tests.model.tiny import make
from tests.refusals import refused

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model and its tokenizer of words."""
    folder = tmp_path_factory.mktemp("model")
    make("llama", vocab_size=1007).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def explained(*typed: str) -> str:
    return data.run(data.GRAMMAR.read(list(typed)))


def test_a_file_and_text_of_the_model(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_records(tmp_path / "a.jsonl", "text", [words(100)])
    typed = [f"{name}:num=2,self:num=4", "--model", model, "--nsamples", "6", "--seqlen", "16", "--show", "1"]
    told = explained(*typed)
    assert "  made     2 of 2 rows, 32 tokens" in told
    assert "  from     written by the model itself" in told
    assert "in all: 6 of 6 rows of 16 tokens: 96 tokens" in told
    assert told.count("\nrow ") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "writing text: 64 of 64 tokens"
    assert explained(*typed, "--quiet") == told
    assert capsys.readouterr().err == ""


def test_rows_with_images_are_counted_without_weights(model: str, tmp_path: Path) -> None:
    save("qwen2_vl", tmp_path)
    file = write_rows(tmp_path, (2, 1, 0, 1))
    (tmp_path / "model.safetensors").unlink()
    typed = [str(file), "--nsamples", "4", "--seqlen", "64", "--quiet", "--model"]
    told = explained(*typed, str(tmp_path))
    assert "  made     4 of 4 rows, " in told
    assert " tokens, 4 images\n" in told
    assert "<|image_pad|>" in told
    with pytest.raises(AutoRoundError, match="found rows with images; needed a model that sees them"):
        explained(*typed, model)


def test_through_the_command(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_records(tmp_path / "a.jsonl", "text", [words(20)])
    assert main(["data", "--dataset", name, "--model", model, "--nsamples", "4", "--seqlen", "16"]) == 0
    out, err = capsys.readouterr()
    assert "in all: 2 of 4 rows of 16 tokens: 21 tokens, 11 of padding" in out
    assert "warning: calibration data: 2 of 4 rows" in err
    assert main(["data", name, "--model", model, "--seqlen", "4000"]) == 1
    assert "found 21 tokens; needed 1000, a quarter of a row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["python-docs"], "data: found no model; needed one for its tokenizer; give --model"),
        (["a.jsonl", "--dataset", "b.jsonl", "--model", "m"], "found 'a.jsonl' and 'b.jsonl'; needed one"),
        (["a:nmu=3", "--model", "m"], "did you mean 'num'"),
        (["a", "--model", "m", "--show", "-1"], "show: found -1; needed at least 0"),
        (["a", "--model", "m", "--bits", "4"], "found unknown flag --bits"),
    ],
)
def test_wrong_usage(typed: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        explained(*typed)


def test_no_tokenizer_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (str(tmp_path), str(tmp_path / "model.gguf")):
        refused(["data", "python-docs", "--model", name], 1, f"error: {name}: found no ", capsys)


def test_offline_reads_the_cache_alone_and_says_so(model: str, tmp_path: Path) -> None:
    (tmp_path / "lines").mkdir()
    lines = "".join(json.dumps({"text": words(20, row)}) + "\n" for row in range(30))
    (tmp_path / "lines" / "train.jsonl").write_text(lines)
    typed = [sys.executable, "-m", "autoround", "data", "org/lines", "--model", model, "--nsamples", "4"]
    typed += ["--seqlen", "16", "--show", "1"]
    told: list[Any] = []
    with FakeHub(datasets={"org/lines": tmp_path / "lines"}) as hub:
        environment = hub.environment(tmp_path / "home")
        for switches in ([], ["--offline"]):
            asked = len(hub.requests)
            done = subprocess.run(
                [*typed, *switches], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
            )
            told.append((done.returncode, done.stdout, done.stderr, len(hub.requests) > asked))
    online, cached = told
    assert (online[0], online[3]) == (0, True)
    assert "from     hub dataset org/lines, split train\n" in online[1]
    assert (cached[0], cached[3]) == (0, False)
    assert "from     hub dataset org/lines, split train, from the cache alone\n" in cached[1]
    assert "no network allowed (offline); reads the copy in the cache as it is" in cached[2]
    assert cached[1].partition("\nrow 1:")[2] == online[1].partition("\nrow 1:")[2]
