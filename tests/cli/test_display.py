"""What a terminal shows."""

import io
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from autoround.cli.display import LiveDisplay, PlainDisplay, display
from autoround.cli.main import main
from autoround.progress import BlockDone, Progress
from tests.cli.stub import StubEngine, StubRun

TUNING = Progress(
    phase="tuning", block=3, blocks=30, step=50, steps=200, loss_first=2e-3, loss=1e-3,
    tokens_per_second=5000.0, eta_seconds=61.0, memory_bytes=1_060_000_000)  # fmt: skip

LOADING = Progress(phase="loading", block=0, blocks=0, message="org/model")
READING = Progress(phase="calibration", block=0, blocks=30, message="reading text")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_the_live_display_and_a_pipe_the_plain_one() -> None:
    with display(Terminal()) as screen:
        assert isinstance(screen, LiveDisplay)
    with display(io.StringIO()) as screen:
        assert isinstance(screen, PlainDisplay)


def test_the_live_bar_tells_block_step_loss_speed_memory_and_time_left() -> None:
    stream = io.StringIO()
    screen = LiveDisplay(Console(file=stream, force_terminal=True, width=80, color_system=None))
    screen.update(READING)
    screen.update(Progress(phase="calibration", block=0, blocks=30, message="writing [bold]text"))
    screen.update(TUNING)
    screen.block_done(BlockDone(index=2, path="layers.2", loss_first=2e-3, loss_best=5e-4, seconds=9.0), 30)
    screen.note("found [brackets]")
    screen.stop()
    text = stream.getvalue()
    assert "writing [bold]text" in text
    assert any("block 3/30" in line and "step 50/200  loss 2.00e-03 -> 1.00e-03" in line for line in text.splitlines())
    assert "5,000 tokens/s  1.06 GB  1:01 left" in text
    assert "block 3/30  layers.2  loss 2.000e-03 -> 5.000e-04  9.0 s\n" in text
    assert "found [brackets]\n" in text


def test_the_bar_makes_room_for_those_of_downloads() -> None:
    """A library's bar that redraws itself above the live one would leave a line behind each time."""
    stream = io.StringIO()
    screen = LiveDisplay(Console(file=stream, force_terminal=True, width=80, color_system=None))
    for event in (LOADING, READING, TUNING, LOADING, READING):
        screen.update(event)
        shown = stream.getvalue().rpartition("\n")[2]  # a bar leaves the cursor in its last line
        assert ("tokens/s" in shown) == (event is TUNING)
    assert (
        stream.getvalue().count("loading: org/model\n") == stream.getvalue().count("calibration: reading text\n") == 2
    )
    screen.stop()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    stream = io.StringIO()
    screen = LiveDisplay(Console(file=stream, force_terminal=True, width=width, color_system=None))
    screen.update(TUNING)
    screen.update(Progress(phase="export", block=3, blocks=3, message="auto_round in /" + "folder/" * 30))
    screen.stop()
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]", stream.getvalue())]
    assert max(map(len, lines)) <= width
    assert "folder/" * 30 in "".join(line.removeprefix("export").strip(" ━╺╸") for line in lines)
    assert "…" not in stream.getvalue()


def test_colors_are_those_of_the_theme() -> None:
    """Fixed ones are invisible on one background or the other."""
    stream = io.StringIO()
    screen = LiveDisplay(Console(file=stream, force_terminal=True, width=80, color_system="truecolor"))
    screen.update(TUNING)
    screen.stop()
    colors = set(re.findall(r"\x1b\[([0-9;]+)m", stream.getvalue()))
    assert colors == {"35", "90", "0"}


def test_a_command_on_a_terminal_leaves_the_finished_blocks_there(capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert main(["m"], quantize=StubEngine()) == 0
    text = terminal.getvalue()
    assert "block 1/2  layers.0  loss 2.000e+00 -> 1.000e+00  finished before\n" in text
    assert "block 2/2  layers.1  loss 2.000e+00 -> 5.000e-01  12.3 s\n" in text
    assert "auto-round: warning: less text than asked\n" in text
    assert capsys.readouterr().out == "autoround-output\n"


def test_a_block_that_was_not_tuned_has_no_loss() -> None:
    stream = io.StringIO()
    PlainDisplay(stream).block_done(BlockDone(index=0, path="layers.0", seconds=0.25), 2)
    assert stream.getvalue() == "block 1/2  layers.0  0.2 s\n"


def test_an_evaluation_moves_the_bar_and_leaves_it_to_lm_eval_afterwards() -> None:
    stream = io.StringIO()
    screen = LiveDisplay(Console(file=stream, force_terminal=True, width=80, color_system=None))
    block = Progress(phase="evaluation", block=3, blocks=30, message="w4, block 3/30", eta_seconds=61.0)
    screen.update(block)
    screen.update(Progress(phase="evaluation", block=0, blocks=0, step=5, steps=10, message="w4, logits"))
    assert "evaluation ━" in stream.getvalue()
    assert "w4, block 3/30" in stream.getvalue() and "1:01 left" in stream.getvalue()
    screen.update(Progress(phase="evaluation", block=0, blocks=0, step=10, steps=10, message="w4, logits"))
    assert not screen._bar.live.is_started
    screen.update(block)
    assert screen._bar.live.is_started
    screen.stop()


def test_a_line_for_each_block_of_an_evaluation_and_for_the_logits() -> None:
    stream = io.StringIO()
    screen = PlainDisplay(stream)
    screen.update(Progress(phase="evaluation", block=3, blocks=30, message="w4, block 3/30", eta_seconds=61.0))
    for step in (0, 5, 10):
        screen.update(Progress(phase="evaluation", block=0, blocks=0, step=step, steps=10, message="w4, logits"))
    assert stream.getvalue() == "w4, block 3/30  1:01 left\nw4, logits\n"


@pytest.mark.parametrize("quiet", [False, True])
def test_a_run_ends_with_the_tokens_of_each_expert(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    class Mixture(StubRun):
        def __iter__(self) -> Iterator[BlockDone]:
            for index, done in enumerate(super().__iter__()):
                yield replace(done, tokens={"mlp.experts": (7, 600, 800 + index)})

    assert main(["model", *["--quiet"] * quiet], quantize=lambda model, recipe, **_: [Mixture(recipe, None, None)]) == 0
    lines = capsys.readouterr().err.splitlines()
    table = [line.split() for line in lines if ".mlp.experts" in line]
    wanted = [[f"layers.{index}.mlp.experts", "7", "600", f"{800 + index}", "1", "of", "3"] for index in range(2)]
    assert table == ([] if quiet else wanted)
