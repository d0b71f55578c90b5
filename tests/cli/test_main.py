"""The commands, driven with an engine that computes nothing: output, messages and exit status."""

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from autoround.cli import main as commands
from autoround.cli.commands import SUBCOMMANDS
from autoround.cli.main import main
from autoround.cli.quantize import program
from autoround.errors import AutoRoundError, DataError, UsageError
from autoround.log import LOGGER
from autoround.recipe import Recipe
from tests.cli.stub import StubEngine, foretell

CLOSED = """
import sys
from autoround.cli.main import main
from tests.cli.stub import StubEngine
sys.exit(main(["m", "--quiet"], quantize=StubEngine()))
"""
RAN = """\
loading: m
calibration: reading text
auto-round: warning: less text than asked
block 1/2  layers.0  loss 2.000e+00 -> 1.000e+00  finished before
block 2/2  layers.1  loss 2.000e+00 -> 5.000e-01  12.3 s  1,234 tokens/s  1.50 GB  1:02:05 left
export: auto_round in out
"""

DRY = """\
StubForCausalLM: 2 blocks, 2 layers to quantize with 4,096 weights

quantized
      2 x up  64x32  W4A16G128

kept
      2 x odd         8x7  odd
      1 x lm_head  100x32  outside the blocks

notes
  worth telling

memory (cpu, bfloat16, eager attention, uncompiled steps)
  peak                     1.5 GB
  process                  400 MB
  activations              100 MB
  outside the blocks         2 MB
  each of 2 blocks         300 MB  layers.0, …

weight files, in bytes
  auto_round             1,234,567  model.safetensors

disk        101 MB at most, with the journal
time        about 6 min (2 min a block, 0.5 s a step, 30 s compiling)
fits        no: memory: needs 1.5 GB, has 1 GB (its control group)
            use --batch_size 4 --gradient_accumulate_steps 2
"""


def test_a_run_prints_its_progress_and_then_the_folders(capsys: pytest.CaptureFixture[str]) -> None:
    engine = StubEngine()
    assert main(["m", "--bits", "2", "--output_dir", "out"], "light", quantize=engine) == 0
    assert engine.asked == [Recipe.preset("light", model="m", bits=2, output_dir="out")]
    assert capsys.readouterr() == ("out\n", RAN)


def test_a_quiet_run_prints_warnings_and_the_folders(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["m", "--quiet", "--output_dir", "out"], quantize=StubEngine()) == 0
    assert capsys.readouterr() == ("out\n", "auto-round: warning: less text than asked\n")


@pytest.mark.parametrize("words", [["m", "--dry-run"], ["plan", "m"]])
def test_a_dry_run_prints_the_plan_and_runs_nothing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    engine = StubEngine(failure_at_once=AssertionError("a dry run opens nothing"))
    assert main(words, quantize=engine, foretell=foretell) == 0
    assert capsys.readouterr() == (DRY, "")
    assert engine.asked == []


def test_a_plan_for_machines_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "m", "--log_json", "--no_probe"], foretell=foretell) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["event"], told["fits"], told["seconds"]) == ("plan", False, None)
    assert told["files"] == {"auto_round": {"model.safetensors": 1234567}}
    assert told["layers"]["layers.0.up"] == "W4A16G128"
    assert told["layers"]["lm_head"] == "outside the blocks"


def test_debug_prints_what_is_logged_and_leaves_the_logger_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = (LOGGER.level, list(LOGGER.handlers))
    assert main(["m", "--debug"], quantize=StubEngine()) == 0
    assert "auto-round: debug: for the curious\n" in capsys.readouterr().err
    assert (LOGGER.level, LOGGER.handlers) == before
    assert LOGGER.level == logging.NOTSET


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (DataError("notes.txt: found 3 tokens; needed 16"), 1, "notes.txt: found 3 tokens; needed 16"),
        (UsageError("device_map: found 'tpu'"), 2, "device_map: found 'tpu'"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors"),
            1,
            "out/model.safetensors: No space left on device; free some space and repeat the command: "
            "finished blocks are kept",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/out"),
            1,
            "/out: Permission denied; change the permissions or the folder",
        ),
        (OSError("hub unreachable"), 1, "hub unreachable"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, OSError | AutoRoundError) else "",
)
@pytest.mark.parametrize("when", ["failure", "failure_at_once"])
def test_an_error_is_one_message(
    error: Exception, status: int, message: str, when: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["m", "--quiet"], "best", quantize=StubEngine(**{when: error})) == status
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[-1]) == ("", f"auto-round-best: error: {message}")
    assert "Traceback" not in err


def test_debug_lets_the_error_through() -> None:
    with pytest.raises(DataError, match="found 3 tokens"):
        main(["m", "--debug"], quantize=StubEngine(failure=DataError("found 3 tokens")))


def test_a_defect_of_this_package_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        main(["m"], quantize=StubEngine(failure=ZeroDivisionError()))


@pytest.mark.parametrize(
    ("flags", "how"),
    [
        ([], ""),
        (["--overwrite"], " without --overwrite"),
        (["--restart"], " without --restart"),
        (["--restart", "--overwrite"], " without --overwrite or --restart"),
    ],
)
def test_an_interrupt_says_how_to_go_on(flags: list[str], how: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["m", *flags], quantize=StubEngine(failure=KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"auto-round: stopped; blocks finished so far are kept: repeat the command{how} to go on"
    )


def test_an_interrupt_of_a_subcommand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(values: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("autoround.cli.data.run", stop)
    assert main(["data", "python-docs", "--model", "m"]) == 130
    assert capsys.readouterr() == ("", "auto-round: stopped; repeat auto-round data to begin again\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model: found none; needed a hub name, folder or .gguf file; try auto-round --help"),
        (["m", "--bits", "5"], "bits: found 5; needed one of 2, 3, 4, 8"),
        (
            ["m", "--group_size", "0"],
            "group_size: found 0; needed a positive number such as 32, 64 or 128, or -1 for one group per row",
        ),
        (
            ["m", "--scheme", "W9A16X"],
            "scheme: found 'W9A16X'; needed W2A16, W3A16, W4A16 or W8A16, optionally with a group size "
            "and ASYM as in W4A16G64 or W4A16G32_ASYM",
        ),
        (["m", "--itres", "3"], "found unknown flag --itres; did you mean '--iters'?"),
        (["m", "--format", "auto_round,auto_gtpq"], "format: found 'auto_gtpq'; needed one of "),
        (["m", "--dataset", "a.txt:nun=3"], "dataset 'a.txt': found unknown option 'nun'; known are "),
    ],
    ids=" ".join,
)
def test_bad_input_is_refused_before_anything_is_opened(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = StubEngine()
    assert main(words, quantize=engine) == 2
    out, err = capsys.readouterr()
    assert engine.asked == []
    assert out == ""
    assert err.startswith(f"auto-round: error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "preset"),
    [
        (commands.auto_round, "default"),
        (commands.best, "best"),
        (commands.light, "light"),
        (commands.rtn, "rtn"),
        (commands.opt_rtn, "opt_rtn"),
    ],
)
def test_each_command_refuses_in_its_own_name(
    command: Callable[[], int], preset: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["ignored", "--bits", "5", "m"])
    assert command() == 2
    assert capsys.readouterr().err == f"{program(preset)}: error: bits: found 5; needed one of 2, 3, 4, 8\n"


@pytest.mark.parametrize(("words", "model"), [(["quantize", "x"], "x"), (["quantized"], "quantized")])
def test_the_word_quantize_may_stand_first(words: list[str], model: str) -> None:
    engine = StubEngine()
    assert main(words, quantize=engine) == 0
    assert [recipe.model for recipe in engine.asked] == [model]


def test_help_may_be_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: auto-round MODEL [flags]")
    assert [name for name in SUBCOMMANDS if f"  auto-round {name} " not in text] == []


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_help_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: auto-round {name} ")


def test_a_closed_pipe_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-c", CLOSED]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "auto-round: warning: less text than asked\n")
