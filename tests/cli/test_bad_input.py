"""What cannot work is one message and exit status 1 or 2 of the real commands, and leaves nothing behind."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.evaluate.conftest import float_folder as float_folder
from tests.refusals import refused

CONFIGS = {
    "unknown key": (b"itres: 3\n", "itres: found an unknown setting; did you mean 'iters'?"),
    "key of another type": (b"1: 2\n", "1: found an unknown setting; auto-round --help lists all"),
    "text for a number": (b"iters: many\n", "iters: found 'many'; needed a whole number"),
    "out of range": (b"bits: 5\n", "bits: found 5; needed one of 2, 3, 4, 8"),
    "broken": (b"{{{", "found no YAML ("),
    "binary": (b"\xff\xfe\x00", "no text; needed a YAML file of settings"),
    "a list": (b"- a\n", "found a list; needed a YAML file of settings"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_file_of_settings(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = CONFIGS[case]
    Path("run.yaml").write_bytes(content)
    refused(["m", "--config", "run.yaml"], 2, message, capsys)
    assert os.listdir() == ["run.yaml"]


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: None, "found no such folder"),
    "an empty folder": (Path.mkdir, "found no config.json; needed a folder as save_pretrained writes it"),
    "a file": (lambda folder: folder.write_text("hi"), "found no config.json"),
    "another config": (
        lambda folder: (folder.mkdir(), (folder / "config.json").write_text('{"a": 1}')),
        "config.json: found model type None",
    ),
    "no weights": (
        lambda folder: (folder.mkdir(), (folder / "config.json").write_text('{"model_type": "llama"}')),
        "found no weights",
    ),
}


@pytest.mark.parametrize("words", [["eval", "it"], ["--model", "it", "--eval"]], ids=["eval", "--eval"])
@pytest.mark.parametrize("case", FOLDERS)
def test_an_evaluation_of_what_is_no_model(
    case: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    make, message = FOLDERS[case]
    make(Path("it"))
    before = sorted(map(str, tmp_path.rglob("*")))
    refused(words, 1, message, capsys)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ("--reference nowhere", 1, "nowhere: found no such folder"),
        ("--eval_dataset nowhere.txt", 1, "dataset 'nowhere.txt': found no such file"),
        ("--eval_output no/where.json", 2, "eval_output: found no folder no; needed one that exists"),
        ("--include_path nowhere --tasks a", 2, "include_path: found no folder nowhere"),
        ("--eval_dataset a:nun=3", 2, "did you mean 'num'?"),
    ],
)
def test_an_evaluation_that_cannot_be(
    flags: str,
    status: int,
    message: str,
    float_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    refused(["eval", str(float_folder), *flags.split()], status, message, capsys)
    assert os.listdir() == []


@pytest.mark.parametrize("make", [lambda folder: None, Path.mkdir], ids=["nothing", "an empty folder"])
def test_an_export_of_what_is_neither_journal_nor_checkpoint(
    make: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "it")
    words = ["export", str(tmp_path / "it"), "--output_dir", str(tmp_path / "out")]
    refused(words, 2, "it: found neither config.json nor manifest.json; needed a quantized checkpoint, or", capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stream", "flags"), [("stdout", []), ("stderr", []), ("stderr", ["--log_json"])], ids=["stdout", "stderr", "json"]
)
def test_a_pipe_that_nobody_reads(stream: str, flags: list[str], float_folder: Path, tmp_path: Path) -> None:
    """Results are written before they are told; a run that cannot tell its progress stops with nothing half-done."""
    reading, writing = os.pipe()
    os.close(reading)
    words = [
        sys.executable,
        "-m",
        "autoround",
        str(float_folder),
        "--iters",
        "0",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: writing}
    done = subprocess.run([*words, *flags], text=True, check=False, **streams)  # type: ignore[call-overload]
    os.close(writing)
    assert done.returncode == 1
    assert "Traceback" not in (done.stdout or "") + (done.stderr or "")
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out", "out.journal"] if stream == "stdout" else [])
