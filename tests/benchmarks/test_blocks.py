"""Commands that tune single blocks: that they run on today's engine, and what they print."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from autoround.backends.base import jit
from benchmarks import loop, rtn, stopping
from benchmarks.cells import Place
from benchmarks.sweep import Texts


@pytest.fixture(autouse=True)
def tiny(float_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in place of SmolLM2, in groups that fit it, uncompiled."""
    words = AutoTokenizer.from_pretrained(float_folder)("import this and that, " * 40).input_ids
    texts = Texts([words[start : start + 16] for start in range(12)], {})

    def read(place: Place, model: str, seed: int, *, tokens: int) -> tuple[Path, Texts]:
        return float_folder, texts

    for module in (loop, stopping):
        monkeypatch.setattr(module, "read_texts", read)
        monkeypatch.setattr(module, "GROUP_SIZE", 32)
        monkeypatch.setattr(module, "jit", lambda function, compiler: jit(function, compiler=None))
    monkeypatch.setattr("autoround.tuner.jit", lambda function, compiler: jit(function, compiler=None))


def test_held_out_losses_along_schedules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopping.main(["--bits", "2", "--steps", "10", "20", "--blocks", "1", "--held", "4", "--folder", str(tmp_path)])
    lines = [line.split(": ") for line in capsys.readouterr().out.splitlines() if "block" in line]
    assert [name for name, _ in lines] == ["2 bits,  10 steps, block  1", "2 bits,  20 steps, block  1"]
    for _, losses in lines:
        found = [float(loss) for loss in losses.split()]
        assert len(found) == stopping.LOOKS
        assert 0 < found[-1] < 1


def test_the_loop_is_timed_beside_its_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop.main(["--steps", "8", "--rounds", "2", "--folder", str(tmp_path)])
    out = capsys.readouterr().out
    assert "round 2: " in out
    assert "the loop adds " in out


@pytest.mark.slow
def test_rounding_to_nearest_is_timed_beside_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rtn.main(["--hidden", "256", "--blocks", "1", "--rounds", "1", "--folder", str(tmp_path)])
    out = capsys.readouterr().out
    assert "the journal, written:" in out
    assert "files alone " in out
    assert list(tmp_path.iterdir()) == []
