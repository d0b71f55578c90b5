"""``--client-table FILE`` writes what the client tests found as a page in Markdown."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.matrix import PASSED, Key
from tests.clients.table import page

# They run in the environments of clients, whose packages are not here.
collect_ignore = ["complete_gguf.py", "generate_vllm.py", "load_folders.py"]
# The worst last: where a case has several tests, that counts.
_OUTCOMES = (PASSED, "skipped", "xfailed", "xpassed", "failed", "error")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--client-table", type=Path, help="write the results of the client tests to this file")


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> Iterator[None]:
    file: Path | None = config.getoption("--client-table", default=None)
    if file is not None:
        found: dict[Key, str] = {}
        for outcome in _OUTCOMES:
            for report in terminalreporter.stats.get(outcome, ()):
                module, _, name = report.nodeid.partition("[")
                found[Path(module.partition("::")[0]).stem, name.removesuffix("]")] = outcome
        file.write_text(page(found))
    yield
