"""What every command that works sets up: --offline, and silence about requests that are tried again."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoround.cli.commands import SUBCOMMANDS, find
from autoround.cli.quantize import grammar
from autoround.cli.session import CACHES, session
from tests.fakehub import FakeHub
from tests.model.tiny import make

ROOT = Path(__file__).parents[2]
HEAD = [sys.executable, "-m", "autoround"]
# Waits of the hub's client between its attempts take half a minute.
HASTY = """
import sys, time
time.sleep = lambda seconds: None
from autoround.cli.main import main
sys.exit(main())
"""
REQUESTS = logging.getLogger("huggingface_hub.utils._http")


def test_every_command_that_may_ask_a_hub_can_be_told_not_to() -> None:
    takers = {name for name in SUBCOMMANDS if "offline" in find(name).GRAMMAR.spellings()}
    assert takers == {"data", "eval", "export"}
    assert "offline" in grammar("default").spellings()


@pytest.mark.parametrize(
    "words",
    [["org/m", "--dry_run"], ["eval", "org/m"], ["data", "python-docs", "--model", "org/m"]],
    ids=lambda words: words[0],
)
def test_offline_asks_no_hub(words: list[str], tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "m")
    with FakeHub(models={"org/m": tmp_path / "m"}) as hub:
        done = subprocess.run(
            [*HEAD, *words, "--offline"], env=hub.environment(tmp_path / "home"), cwd=ROOT,
            capture_output=True, text=True, check=False)  # fmt: skip
    assert hub.requests == []
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("auto-round: error: org/m: found no ")


@pytest.mark.parametrize("words", [["eval", "org/m"], ["data", "python-docs", "--model", "org/m"]], ids=lambda w: w[0])
def test_a_hub_out_of_reach_is_one_message(words: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", HASTY, *words], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    *before, message = done.stderr.splitlines()
    assert before == ["loading: org/m"]
    assert message.startswith("auto-round: error: org/m: found no ")


@pytest.mark.parametrize(("switches", "told"), [(["quiet"], 1), (["debug"], 3)])
def test_only_long_waits_are_told_unless_debugging(
    switches: list[str], told: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(REQUESTS, "propagate", True)
    monkeypatch.setattr(REQUESTS.parent, "propagate", True)
    with session(switches):
        REQUESTS.warning("'refused' thrown while requesting HEAD http://127.0.0.1")
        REQUESTS.warning("Retrying in 1s [Retry 1/5].")
        REQUESTS.warning("Rate limited. Waiting 300s before retry [Retry 1/5].")
    assert len(caplog.messages) == told
    REQUESTS.warning("after")
    assert caplog.messages[-1] == "after"


MULTIPLY = """
import sys
from autoround.cli.session import session
with session(sys.argv[1:]):
    import psutil, torch
    torch.set_num_threads(1)
    process, weight_IO = psutil.Process(), torch.ones(256, 256, dtype=torch.bfloat16)
    torch.ones(99, 256, dtype=torch.bfloat16) @ weight_IO
    before = process.memory_info().rss
    for rows in range(100, 500):
        torch.ones(rows, 256, dtype=torch.bfloat16) @ weight_IO
    print(process.memory_info().rss - before)
"""


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_bf16"), reason="needs products by oneDNN")
def test_products_of_many_shapes_are_not_kept() -> None:
    """As experts have them; variables that are set already stay."""
    taken = []
    for variables in ({}, dict.fromkeys(CACHES, "1024")):
        environment = {key: value for key, value in os.environ.items() if key not in CACHES} | variables
        words = [sys.executable, "-c", MULTIPLY, "quiet"]
        done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
        taken.append(int(done.stdout))
    assert taken[0] < 0.6 * taken[1]
