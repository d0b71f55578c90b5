"""``--log_json``: nothing but objects on stderr, whoever writes there."""

import io
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from autoround.cli.json_lines import JsonLines, Others
from autoround.cli.main import main
from autoround.errors import DataError
from autoround.progress import BlockDone, Progress
from tests.cli.stub import StubEngine, StubRun


def objects(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    assert all(each.pop("time") > 1e9 for each in found)
    return found


@pytest.mark.parametrize("flag", ["--log_json", "--log-json"])
def test_a_run_tells_every_event(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["m", "--output_dir", "out", flag], quantize=StubEngine()) == 0
    out, err = capsys.readouterr()
    assert out == "out\n"
    found = objects(err)
    assert [each["event"] for each in found] == [
        "progress", "progress", "log", "block", "progress", "progress", "block", "progress",
    ]  # fmt: skip
    assert [each["phase"] for each in found if each["event"] == "progress"] == [
        "loading", "calibration", "tuning", "tuning", "export",
    ]  # fmt: skip
    assert found[2] == {"event": "log", "level": "warning", "text": "less text than asked"}
    assert set(found[5]) == {"event", *Progress.__dataclass_fields__}
    assert (found[5]["eta_seconds"], found[5]["loss"], found[5]["tokens_per_second"]) == (3725, 0.5, 1234.5)
    assert set(found[6]) == {"event", "blocks", *BlockDone.__dataclass_fields__}
    assert (found[3]["resumed"], found[6]["path"], found[6]["blocks"]) == (True, "layers.1", 2)


def test_a_quiet_run_tells_warnings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["m", "--quiet", "--log_json"], quantize=StubEngine()) == 0
    assert [each["event"] for each in objects(capsys.readouterr().err)] == ["log"]


@pytest.mark.parametrize(
    ("words", "failure", "status", "text"),
    [
        (["m"], DataError("found 3 tokens"), 1, "found 3 tokens"),
        (["m"], KeyboardInterrupt(), 130, "stopped; blocks finished so far are kept: repeat the command to go on"),
        (["m", "--bits", "5"], None, 2, "bits: found 5; needed one of 2, 3, 4, 8"),
        (["eval"], None, 2, "eval: found no model; needed a folder, GGUF file or hub name; try auto-round eval --help"),
    ],
    ids=str,
)
def test_an_error_is_the_last_object(
    words: list[str], failure: BaseException | None, status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--log-json"], quantize=StubEngine(failure)) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert objects(err)[-1] == {"event": "error", "text": text, "exit_status": status}


class Noisy(StubEngine):
    """Prints as libraries do."""

    def __call__(self, *args: Any, **settings: Any) -> list[StubRun]:
        print("half a line", end="", file=sys.stderr)
        print(", and the rest\n\n", file=sys.stderr)
        for share in (1, 50, 100):
            print(f"\rreading {share}%", end="", file=sys.stderr)
        print(file=sys.stderr)
        return super().__call__(*args, **settings)


def test_what_others_print_is_an_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stderr
    assert main(["m", "--quiet", "--log_json"], quantize=Noisy()) == 0
    assert sys.stderr is before
    found = objects(capsys.readouterr().err)
    assert [each["text"] for each in found] == ["half a line, and the rest", "reading 100%", "less text than asked"]


@pytest.fixture
def written() -> Iterator[tuple[Others, io.StringIO]]:
    stream = io.StringIO()
    yield Others(JsonLines(stream)), stream


def test_a_bar_that_redraws_itself_is_not_kept(written: tuple[Others, io.StringIO]) -> None:
    others, stream = written
    for step in range(10_000):
        assert others.write(f"\r{step} of 10000") > 0
    assert len(others._rest) < 20
    assert stream.getvalue() == ""


def test_numbers_that_json_lacks_are_null() -> None:
    stream = io.StringIO()
    JsonLines(stream).update(Progress(phase="tuning", block=1, blocks=2, loss=float("nan"), eta_seconds=float("inf")))
    (found,) = objects(stream.getvalue())
    assert (found["loss"], found["eta_seconds"]) == (None, None)
