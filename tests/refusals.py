"""What cannot work ends in one message of one line."""

import pytest

from autoround.cli.main import main


def says(message: str, *parts: str) -> bool:
    """Whether a message is one line and has these parts."""
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message
    return True


def refused(words: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command says this, after what it was about to load, and nothing on stdout."""
    capsys.readouterr()
    assert main(words) == status
    out, err = capsys.readouterr()
    *before, last = err.splitlines()
    assert out == ""
    assert last.startswith("auto-round: error: ")
    assert says(last, message)
    assert all(line.startswith("loading: ") for line in before)
