"""``--client-table FILE`` writes what the client tests found as a table in Markdown."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.test_loaders import CASES, CLIENTS, Case

HEAD = """\
# Formats and the clients that read them

Written by `make clients`: every line is a folder of a tiny random Llama or GPT-2 that this package wrote, loaded by a
client in an environment of its own, which generated the greedy tokens of this package's own loader, with logits within
0.05. Widths and symmetries are those that were run.

| format | client | symmetric | asymmetric | also |
|---|---|---|---|---|
"""
TAIL = """
| not run | why |
|---|---|
| `auto_round`, packing `auto_round:auto_awq`, in auto-round 0.16.1 | needs GPTQModel or auto-round-lib there |
| `auto_gptq`, asymmetric, in GPTQModel 7.7 | it takes asymmetric codes of version 1 only from itself: use `gptq_v2` |
| `auto_gptq` and `gptq_v2`, mixed bits, in transformers 5.23 | optimum does not read the setting `dynamic` |
| `llm_compressor`, asymmetric, in transformers 5.23 | expects unpacked zero points; compressed-tensors packs them |
| `llm_compressor`, 3 bits | versions of compressed-tensors pack them in two ways that no file tells apart |
| vLLM, SGLang | not installed here |
| GGUF | not written yet |
"""
# End of a case's name -> what it shows beside widths and symmetry.
ALSO = {
    "whole-rows": "whole rows as groups",
    "mixed-groups": "mixed group sizes",
    "mixed-bits": "mixed bits",
    "quantized-head": "a quantized head",
    "kept-layers": "kept layers",
    "tied-conv1d": "Conv1D and a tied head",
    "bfloat16-scales": "bfloat16 scales",
    "points-of-0": "zero points of 0",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--client-table", type=Path, help="write the results of the client tests to this file")


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> Iterator[None]:
    file: Path | None = config.getoption("--client-table", default=None)
    if file is not None:
        reports = [report for key in ("passed", "failed", "error") for report in terminalreporter.stats.get(key, ())]
        outcomes = {report.nodeid.partition("[")[2].rstrip("]"): report.outcome for report in reports}
        file.write_text(HEAD + "".join(_rows(outcomes)) + TAIL)
    yield


def _rows(outcomes: dict[str, str]) -> Iterator[str]:
    """A line per format and client; a case that did not pass is named with its outcome."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, case in CASES.items():
        groups[case.form, CLIENTS[case.loader, case.environment]].append(name)
    for (form, client), names in sorted(groups.items()):
        passed = [name for name in names if outcomes.get(name) == "passed"]
        failed = [f"**{name}: {outcomes.get(name, 'not run')}**" for name in names if name not in passed]
        also = [text for suffix, text in ALSO.items() if any(name.endswith(suffix) for name in passed)]
        widths = [_bits([CASES[name] for name in passed], sym) for sym in (True, False)]
        yield f"| `{form}` | {client} | {' | '.join(widths)} | {', '.join((*also, *failed))} |\n"


def _bits(cases: list[Case], sym: bool) -> str:
    found = sorted({case.settings.get("bits", 4) for case in cases if case.settings.get("sym", True) is sym})
    return ", ".join(map(str, found))
