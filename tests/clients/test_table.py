"""The page of formats and clients has no empty cell, and tells what did not pass."""

from pathlib import Path

import pytest

from autoround.formats.gguf.recipes import FILE_TYPES
from tests.clients import test_own_loader
from tests.clients.matrix import FILE_COLUMNS, NOT_READ, PASSED, TESTS, Key, claims, gaps
from tests.clients.table import page

FORMATS = Path(__file__).parents[2] / "docs" / "formats.md"


ALL_PASSED: dict[Key, str] = {
    **{(tests.module, name): PASSED for tests in TESTS for name in (*tests.cases, *tests.refused)},
    **{key(file_type): PASSED for key in FILE_COLUMNS.values() for file_type in FILE_TYPES},
}


def test_every_cell_is_a_test_or_has_a_reason() -> None:
    assert gaps(claims({})) == set()


def test_a_cell_without_a_test_is_found() -> None:
    found = claims({})
    (some,) = (claim for claim in found if claim.client == "GPTQModel 7.7" and claim.words and claim.cell == (8, False))
    assert gaps([claim for claim in found if claim != some]) == {(some.client, "auto_gptq", (8, False))}


def test_no_client_computes_from_a_layout_that_it_does_not_read() -> None:
    assert [
        claim for claim in claims({}) if claim.layout in NOT_READ.get(claim.client, {}) and claim.words is None
    ] == []


def test_every_case_is_shown() -> None:
    assert [claim for claim in claims({}) if claim.cell is None and not claim.beside] == []
    assert [tests.module for tests in TESTS if tests.cases.keys() & tests.refused.keys()] == []


def test_the_page_is_that_of_a_run_in_which_all_passed() -> None:
    assert FORMATS.read_text() == page(ALL_PASSED), "the cases have changed: run make clients"


@pytest.mark.parametrize(
    ("key", "line"),
    [
        (("test_loaders", "gptqmodel-gptq_v2-sym-3"), "| `gptq_v2` | 2, 3 **failed**, 4, 8 | 2, 3, 4, 8 |"),
        (("test_loaders", "gptqmodel-auto_gptq-asym-3"), "only supported if produced by gptqmodel” **failed**"),
        (("test_loaders", "gptqmodel-compressed"), "compressed-tensors quantization” **failed**"),
        (("test_vllm", "vllm-gptq-whole-rows"), "whole rows as groups **failed**"),
        (FILE_COLUMNS["llama.cpp through xllamacpp 2026.10"]("q4_k_m"), "| `gguf:q4_k_m` | **failed** | yes | yes |"),
        (("test_own_loader", f"q2_k-{test_own_loader.CLIENTS['load', 'own']}"), "| `gguf:q2_k` | yes | **failed** |"),
    ],
)
def test_what_failed_is_named(key: Key, line: str) -> None:
    assert line in page(ALL_PASSED | {key: "failed"})
    assert line not in page(ALL_PASSED)


def test_what_was_not_run_is_named() -> None:
    key = ("test_loaders", "library-asym-8")
    outcomes = {own: outcome for own, outcome in ALL_PASSED.items() if own != key}
    assert "| `llm_compressor` | 2, 4, 8 | 2, 4, 8 **not run** |" in page(outcomes)
