"""Disks that are full or not writable, and journals that something else has changed: an error that says where and
what to do, or the same bytes; never others."""

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.reliability.conftest import Driver, Whole, left

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode:
        pytest.skip("needs root, and leave to mount")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


@pytest.mark.parametrize(
    ("share", "activations"),
    [(0.0, "ram"), (0.02, "ram"), (0.02, "disk"), (0.2, "ram"), (0.2, "disk"), (0.5, "ram"), (0.9, "ram")],
)
def test_a_full_disk(share: float, activations: str, driver: Driver, whole: Whole, disk: Path) -> None:
    """At the begin, while blocks are tuned, and while files are written; the run goes on when there is space."""
    remount(disk, f"size={max(int(share * whole.size), 4096)}")
    told = driver.run(disk / "out", settings={"activations": activations})
    assert told["error"].startswith(f"{disk}/out"), told
    assert "space" in told["error"]
    assert not (disk / "out" / "fake").exists()
    assert not list(disk.rglob("*.partial"))
    remount(disk, f"size={4 * whole.size}")
    assert "error" not in driver.run(disk / "out")
    assert left(disk) == whole.files


def test_files_of_bounded_size(driver: Driver, whole: Whole, tmp_path: Path) -> None:
    """The same by a limit that needs no file system of its own: some files can be written, larger ones cannot."""
    errors = [driver.run(tmp_path / "out", file_limit=limit)["error"] for limit in (1000, 8000, 30_000)]
    for error in errors:
        assert error.startswith(f"{tmp_path}/out")
        assert "needed a writable folder" in error
    assert "error" not in driver.run(tmp_path / "out")
    assert left(tmp_path) == whole.files


@pytest.mark.parametrize("blocks", [0, 2, 4])
def test_a_folder_that_nobody_may_write_to(blocks: int, driver: Driver, whole: Whole, disk: Path) -> None:
    for _ in range(blocks):
        driver.run(disk / "out", after_block=True)
    remount(disk, "ro")
    told = driver.run(disk / "out")
    assert told["error"].startswith(f"{disk}/out"), told
    assert "needed a writable folder" in told["error"]
    remount(disk, "rw")
    assert "error" not in driver.run(disk / "out")
    assert left(disk) == whole.files


def flip(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, chance: random.Random) -> None:
    os.truncate(file, chance.randrange(file.stat().st_size))


@pytest.fixture(scope="module")
def begun(driver: Driver) -> Path:
    """The folder of a run of which two blocks are done."""
    folder = driver.folder / "begun"
    for _ in range(2):
        driver.run(folder / "out", after_block=True)
    return folder


NAMES = ("manifest.json", "blocks/00000.safetensors", "blocks/00001.safetensors",
         "activations/1.json", "activations/1.float_NTD", "activations/1.quantized_NTD")  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES, "activations/0.float_NTD"])
@pytest.mark.parametrize(("spoil", "times"), [(flip, 2), (truncate, 1)])
def test_a_file_of_the_journal_is_damaged(
    spoil: Callable[[Path, random.Random], None],
    times: int,
    name: str,
    begun: Path,
    driver: Driver,
    whole: Whole,
    tmp_path: Path,
) -> None:
    """It is named before any block is tuned; only the older activations, which nothing needs any more, are not."""
    chance = random.Random(name)
    for number in range(times):
        folder = tmp_path / str(number)
        shutil.copytree(begun, folder)
        spoil(folder / "out.journal" / name, chance)
        told = driver.run(folder / "out")
        if name in NAMES:
            assert told["error"].startswith(f"{folder / 'out.journal'}"), told
            assert "--restart" in told["error"]
            assert not (folder / "out.journal" / "blocks" / "00002.safetensors").exists()
            if number:
                continue
            told = driver.run(folder / "out", settings={"restart": True})
        assert "error" not in told
        assert left(folder) == whole.files
