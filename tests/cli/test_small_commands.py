"""list, doctor and completion: what they print."""

import shutil
import subprocess

import pytest

from autoround.cli.commands import SUBCOMMANDS
from autoround.cli.listing import TABLES
from autoround.cli.main import main
from autoround.data.hub_names import SHORT_NAMES
from autoround.formats.registry import available
from autoround.recipe import PRESETS


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("formats", available()),
        ("schemes", ("W2A16", "W4A16G32_ASYM")),
        ("datasets", ("python-docs", *SHORT_NAMES)),
        (
            "recipes",
            ("auto-round ", *(f"auto-round-{name.replace('_', '-')}" for name in PRESETS if name != "default")),
        ),
    ],
)
def test_a_list_has_every_name(what: str, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", what]) == 0
    out = capsys.readouterr().out
    assert [name for name in names if name not in out] == []


def test_every_table_has_a_test() -> None:
    assert set(TABLES) == {"formats", "schemes", "datasets", "recipes"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list"], "list: found ''; needed one of formats, schemes, datasets, recipes"),
        (
            ["list", "fromats"],
            "list: found 'fromats'; needed one of formats, schemes, datasets, recipes; did you mean 'formats'?",
        ),
        (["list", "formats", "x"], "found 'x', which belongs to no flag; needed formats, schemes, datasets or recipes; "
                                   "quote values that have spaces"),
        (["completion", "fish"], "completion: found 'fish'; needed bash, zsh or tcsh"),
        (["doctor", "--qqqq", "3"], "found unknown flag --qqqq; --help lists all"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_is_wrong_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == f"auto-round: error: {message}\n"


def test_the_doctor_looks_at_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    topics = [line[:14].strip() for line in lines if line[:14].strip()]
    assert topics[:5] == ["autoround", "libraries", "memory", "disk here", "cpu"]
    assert topics[topics.index("hpu") + 1 :][:2] == ["C++ compiler", "clients here"]
    (cpu,) = (line for line in lines if line.startswith("cpu "))
    assert "float32" in cpu and "GFLOP/s" in cpu and "computes in" in cpu


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_script_knows_commands_and_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert [name for name in SUBCOMMANDS if name not in script] == []
    assert "group_size" in script and "max_shard_size" in script
    if shell == "bash" and shutil.which("bash"):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("words", [["list", "formats"], ["list", "schemes"], ["list", "datasets"], ["list", "recipes"]])
@pytest.mark.parametrize("width", [80, 200])
def test_tables_fit_the_terminal(
    words: list[str], width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("autoround.cli.listing.terminal_width", lambda: width)
    assert main(words) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width


@pytest.mark.parametrize("name", ["", *SUBCOMMANDS])
def test_help_fits_a_terminal_of_80_columns(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([name, "--help"] if name else ["--help"])
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []
