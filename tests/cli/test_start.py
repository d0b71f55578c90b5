"""What starting costs, what is public, and that the commands are installed."""

import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import autoround
from autoround.cli.commands import SUBCOMMANDS

ROOT = Path(__file__).parents[2]
HEAVY = {"accelerate", "datasets", "numpy", "rich", "safetensors", "torch", "transformers"}


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, cwd=ROOT)


def cost(*words: str) -> "tuple[float, subprocess.CompletedProcess[str]]":
    """Seconds of a command on the processor, the least of three runs: a start waits for nothing, and on a busy machine
    the clock tells of others."""
    least = float("inf")
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run("-m", "autoround", *words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        least = min(least, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return least, done


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in SUBCOMMANDS)], ids=" ".join)
def test_help_answers_at_once(words: list[str]) -> None:
    seconds, done = cost(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(" ".join(["usage: auto-round", *words[:-1]]))
    assert seconds < 0.3


@pytest.mark.parametrize("words", [["m"], *([name] for name in SUBCOMMANDS)], ids=" ".join)
def test_a_wrong_flag_is_refused_at_once(words: list[str]) -> None:
    seconds, done = cost(*words, "--itres", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("auto-round: error: found unknown flag --itres")
    assert seconds < 0.3


def test_importing_the_package_takes_no_time() -> None:
    code = "import time; start = time.process_time(); import autoround; print(time.process_time() - start)"
    assert min(float(run("-c", code).stdout) for _ in range(3)) < 0.1


def test_neither_help_nor_a_refusal_imports_anything_heavy() -> None:
    code = f"""
import contextlib, sys, autoround, autoround.recipe, autoround.cli.main
assert autoround.cli.main.main(["model", "--format", "nope"]) == 2
for words in {[[], *([name] for name in SUBCOMMANDS)]!r}:
    assert autoround.cli.main.main([*words, "--itres", "3"]) == 2
    with contextlib.suppress(SystemExit):
        autoround.cli.main.main([*words, "--help"])
print(sorted(set(sys.modules) & {HEAVY!r}))
"""
    assert run("-c", code).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", [["model", "--bits", "5"], ["model", "--avg_bits", "4"], []], ids=" ".join)
def test_wrong_usage_is_one_line_and_status_2(words: list[str]) -> None:
    done = run("-m", "autoround", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("auto-round: error: ")
    assert done.stderr.count("\n") == 1


def test_public_names_are_frozen_and_found() -> None:
    """A name added or removed on purpose changes this list in the same commit."""
    assert autoround.__all__ == [
        "AutoRound",
        "QuantSpec",
        "Recipe",
        "__version__",
        "load",
        "quantize",
        "quantize_each",
        "register",
    ]
    assert set(autoround.__all__) <= set(dir(autoround))
    assert [name for name in autoround.__all__ if getattr(autoround, name) is None] == []
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = autoround.quantise


def test_public_names_of_evaluation_are_found() -> None:
    from autoround import evaluate

    assert [name for name in evaluate.__all__ if getattr(evaluate, name) is None] == []
    with pytest.raises(AttributeError, match=r"module 'autoround\.evaluate' has no attribute 'compere'"):
        _ = evaluate.compere


def test_every_console_script_has_its_function_and_both_spellings() -> None:
    tomllib = pytest.importorskip("tomllib")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {name.replace("_", "-") for name in scripts} == {name for name in scripts if "_" not in name}
    for name, place in scripts.items():
        assert place == scripts[name.replace("_", "-")]
        module, _, function = place.partition(":")
        assert callable(getattr(import_module(module), function))
    assert set(scripts) >= {"auto-round", "auto-round-best", "auto-round-light", "auto-round-rtn", "auto-round-eval"}
