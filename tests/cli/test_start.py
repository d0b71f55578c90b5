"""What starting costs, what is public, and that the commands are installed."""

import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

import autoround

ROOT = Path(__file__).parents[2]
HEAVY = {"accelerate", "datasets", "numpy", "rich", "safetensors", "torch", "transformers"}


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, cwd=ROOT)


def test_help_answers_at_once() -> None:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = run("-m", "autoround", "--help")
        times.append(time.perf_counter() - start)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: auto-round MODEL [flags]")
    assert min(times) < 0.3


def test_neither_help_nor_a_refusal_imports_anything_heavy() -> None:
    code = f"""
import sys, autoround, autoround.recipe, autoround.cli.main
assert autoround.cli.main.main(["model", "--format", "nope"]) == 2
try:
    autoround.cli.main.main(["--help"])
except SystemExit:
    pass
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


def test_every_console_script_has_its_function_and_both_spellings() -> None:
    tomllib = pytest.importorskip("tomllib")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {name.replace("_", "-") for name in scripts} == {name for name in scripts if "_" not in name}
    for name, place in scripts.items():
        assert place == scripts[name.replace("_", "-")]
        module, _, function = place.partition(":")
        assert callable(getattr(import_module(module), function))
    assert set(scripts) >= {"auto-round", "auto-round-best", "auto-round-light", "auto-round-rtn", "auto-round-eval"}
