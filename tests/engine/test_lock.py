"""One process at a time works on a journal."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from autoround.engine import quantize
from autoround.errors import JournalError
from autoround.journal import open_journal
from autoround.progress import Progress
from tests.children import events, start
from tests.engine.small import hashes, make, recipe

CHILD = Path(__file__).with_name("interrupted.py")

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
        for restart in (False, True):
            with pytest.raises(JournalError, match="found another run at work on it; wait until that ends"):
                open_journal(folder, MANIFEST, restart=restart)
        assert (folder / "manifest.json").read_bytes() == before
        holder.kill()
    assert open_journal(folder, MANIFEST).finished() == 0


def test_a_process_may_open_a_journal_again(tmp_path: Path) -> None:
    first = open_journal(tmp_path / "out.journal", MANIFEST)
    second = open_journal(tmp_path / "out.journal", MANIFEST)
    assert first.folder == second.folder


@pytest.mark.slow
def test_a_run_beside_another_one_is_refused_before_any_work(tmp_path: Path) -> None:
    """The other run stands still in the middle of its work, goes on, and ends as if nothing had been."""
    make().save_pretrained(tmp_path / "source")
    made = recipe(tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(made)))
    with start(CHILD, tmp_path) as child:
        assert "block 0 done" in events(child)
        before, told = hashes(tmp_path), list[Progress]()
        for settings in ({}, {"restart": True}, {"overwrite": True}, {"iters": 3}):
            run = quantize(tmp_path / "source", recipe(tmp_path, **settings), on_progress=told.append)
            with pytest.raises(JournalError, match="found another run at work on it; wait until that ends"):
                next(iter(run))
        assert told == []
        assert hashes(tmp_path) == before
        child.communicate("\n" * 100)
    assert child.returncode == 0
    quantize(tmp_path / "source", recipe(tmp_path / "alone")).export()
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone" / "out")
