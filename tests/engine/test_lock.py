"""One process at a time works on a journal."""

import subprocess
import sys
from pathlib import Path

import pytest

from autoround.errors import JournalError
from autoround.journal import open_journal

MANIFEST = {"recipe": {"bits": 4}}
HOLD = f"""
import sys
from pathlib import Path
from autoround.journal import open_journal
journal = open_journal(Path(sys.argv[1]), {MANIFEST!r})
print("open", flush=True)
sys.stdin.read()
"""


def test_a_journal_that_another_process_works_on_is_refused_until_that_ends(tmp_path: Path) -> None:
    folder = tmp_path / "out.journal"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        before = (folder / "manifest.json").read_bytes()
        for overwrite in (False, True):
            with pytest.raises(JournalError, match="found another run at work on it; wait until that ends"):
                open_journal(folder, MANIFEST, overwrite=overwrite)
        assert (folder / "manifest.json").read_bytes() == before
        holder.kill()
    assert open_journal(folder, MANIFEST).finished() == 0


def test_a_process_may_open_a_journal_again(tmp_path: Path) -> None:
    first = open_journal(tmp_path / "out.journal", MANIFEST)
    second = open_journal(tmp_path / "out.journal", MANIFEST)
    assert first.folder == second.folder
