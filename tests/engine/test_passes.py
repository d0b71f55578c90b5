"""How many rows pass through a block together, and that it changes nothing but the time."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autoround import func, passes
from autoround.func.block import BlockFn
from autoround.passes import CPU_TOKENS, at_once
from tests.engine.small import ROWS, TOKENS, codes, divergence, equal_share, make, replaced, rows, tune


def block_of(stacks: dict[str, int]) -> BlockFn:
    return BlockFn(torch.nn.Linear(1, 1), "bare", frozenset(), stacks)


def sizes(batch: int, tokens: int, device: str = "cpu", stacks: dict[str, int] | None = None) -> list[int]:
    hidden_BTD = torch.empty(batch, tokens, 4, device="meta")
    together = at_once(torch.arange(batch), block_of(stacks or {}), hidden_BTD, torch.device(device))
    assert torch.cat(list(together)).tolist() == list(range(batch))
    return [len(rows_B) for rows_B in together]


def test_as_many_rows_pass_together_as_caches_hold() -> None:
    assert sizes(8, CPU_TOKENS // 2) == [2, 2, 2, 2]
    assert sizes(7, CPU_TOKENS // 4) == [4, 3]
    assert sizes(2, 4 * CPU_TOKENS) == [1, 1]
    assert sizes(8, CPU_TOKENS, device="meta") == [8]
    assert sizes(8, CPU_TOKENS, stacks={"experts.up.weight": 4}) == [8]


@pytest.fixture(params=[1, 3])
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """So many rows together, of batches of four."""
    monkeypatch.setattr(passes, "CPU_TOKENS", request.param * TOKENS)
    return request.param


def padded() -> list[list[int]]:
    """Rows of which every other one is shorter."""
    return [row[: TOKENS - 3 * (index % 2)] for index, row in enumerate(rows())]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_runs_are_the_same_however_many_rows_pass_together(family: str, few: int, tmp_path: Path) -> None:
    del few  # is in force
    model = make(family)
    settings = {"dataset": padded(), "iters": 0, "clip_search": True, "compensate": True, "bits": 4}
    split = tune(model, tmp_path / "split", dtype="float32", **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "CPU_TOKENS", ROWS * TOKENS)
        whole = tune(model, tmp_path / "whole", dtype="float32", **settings)
    one, two = codes(split), codes(whole)
    first = [path for path in one if ".0." in path]
    # one that is rounded otherwise changes those after it
    assert equal_share({path: one[path] for path in first}, {path: two[path] for path in first}) > 0.99
    assert equal_share(one, two) > 0.97


def first_block(folder: Path, bits: int, **settings: object) -> dict[str, func.IntCodes]:
    found = codes(tune(make(), folder, bits=bits, dtype="float32", clip_search=True, compensate=True, **settings))
    return {path: own for path, own in found.items() if ".layers.0." in path}


@pytest.mark.parametrize(("bits", "iters", "refitted"), [(2, 0, True), (3, 0, True), (4, 0, False), (2, 2, False)])
def test_scales_of_few_bits_are_refitted_where_no_step_is_taken(
    bits: int, iters: int, refitted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = first_block(tmp_path / "one", bits, iters=iters)
    monkeypatch.setattr(func, "refits", lambda spec: False)
    plain = first_block(tmp_path / "two", bits, iters=iters)
    assert all(torch.equal(own.q_OI, plain[path].q_OI) for path, own in found.items())
    assert [torch.equal(own.scale_OG, plain[path].scale_OG) for path, own in found.items()] == [not refitted] * len(
        plain
    )


def test_refitted_scales_are_closer_to_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    refitted = divergence(replaced("llama", tune(model, tmp_path / "one", "opt_rtn", dtype="float32")), model)
    monkeypatch.setattr(func, "refits", lambda spec: False)
    plain = divergence(replaced("llama", tune(model, tmp_path / "two", "opt_rtn", dtype="float32")), model)
    assert refitted < plain
