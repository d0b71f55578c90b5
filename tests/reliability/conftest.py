"""A process that starts runs and kills them, and what a run leaves when nobody kills it."""

import json
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.children import start
from tests.engine.small import hashes, make, rows

DRIVER = Path(__file__).with_name("driver.py")
BLOCKS = 4
SETTINGS: dict[str, Any] = {
    "iters": 3, "bits": 2, "group_size": 32, "dataset": rows(), "nsamples": 16, "seqlen": 16, "batch_size": 4,
    "device_map": "cpu", "clip_search": False, "format": ["auto_round", "fake"], "max_shard_size": "60KB",
}  # fmt: skip


@dataclass(frozen=True)
class Driver:
    """The process; see ``driver.py``."""

    folder: Path
    process: "subprocess.Popen[str]"
    kills: list[bool] = field(default_factory=list)

    def run(self, output: Path, *, settings: dict[str, Any] | None = None, **order: Any) -> dict[str, Any]:
        """One attempt at a run; what became of it."""
        made = SETTINGS | {"output_dir": str(output)} | (settings or {})
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"settings": made, **order}) + "\n")
        self.process.stdin.flush()
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        self.kills.append(told["status"] == -signal.SIGKILL)
        return told


@pytest.fixture(scope="package")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    folder = tmp_path_factory.mktemp("killed")
    make("llama", num_hidden_layers=BLOCKS).save_pretrained(folder / "source")
    with start(DRIVER, folder) as process:
        made = Driver(folder, process)
        yield made
        print(f"{len(made.kills)} attempts, {sum(made.kills)} of them killed")
        assert process.stdin is not None
        process.stdin.close()


@dataclass(frozen=True)
class Whole:
    """What a run leaves that nobody kills: files, and how long it took."""

    files: dict[str, str]
    seconds: float
    size: int


@pytest.fixture(scope="package")
def whole(driver: Driver) -> Whole:
    folder = driver.folder / "whole"
    told = driver.run(folder / "out")
    assert told["status"] == 0
    assert "error" not in told
    files = left(folder)
    assert len(files) > 2 * BLOCKS  # several shards of two formats, and the journal
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Whole(files, told["seconds"], size)


def left(folder: Path) -> dict[str, str]:
    """Hashes of all files of a run, hidden ones too, but for the settings, which name the folder."""
    return {name: found for name, found in hashes(folder).items() if name != "out.journal/run.yaml"}
