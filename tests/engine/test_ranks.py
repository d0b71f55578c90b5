"""Processes that torchrun starts: the same codes whatever their number, and what happens where one goes wrong."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from autoround import func
from autoround.activations import Inputs, Stream
from autoround.backends.base import of_rank
from autoround.backends.gpu import GpuBackend
from autoround.engine import quantize
from autoround.errors import AutoRoundError, JournalError, UsageError
from autoround.func import observe
from autoround.func.types import IntCodes
from autoround.journal import read_manifest
from autoround.launch import Launch, launched
from autoround.model.calls import CallTemplate, Hidden
from autoround.passes import Passes
from autoround.ranks import ALONE, Alone, Ranks, agree, compare, join, owners, summed
from autoround.spec import QuantSpec
from tests.engine.small import codes, hashes, make, recipe, stopped, tune

CHILD = Path(__file__).with_name("ranked.py")
ROOT = CHILD.parents[2]


def start(folder: Path, ranks: int, *orders: tuple[str, str, dict[str, Any]]) -> "subprocess.CompletedProcess[str]":
    """Have processes do what is ordered; they have ended."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(CHILD)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*words, str(folder), json.dumps(orders)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def told(folder: Path, name: str, ranks: int) -> list[str]:
    return [(folder / f"{name}.{rank}").read_text() for rank in range(ranks)]


@pytest.mark.slow
def test_one_two_and_four_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte is the same, also of a run that lost a process and went on with more of them, or with one."""
    make("llama").save_pretrained(tmp_path / "source")
    make("llama_3").save_pretrained(tmp_path / "three")
    columns = {"iters": 0}  # rounded in turn, by Hessians
    one = start(tmp_path, 1, ("run", "one", {}), ("run", "columns_1", columns))
    assert one.returncode == 0, one.stderr
    whole = hashes(tmp_path / "one" / "out")
    killed = start(tmp_path, 2, ("killed", "killed", {}))
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    blocks = tmp_path / "killed" / "out.journal" / "blocks"
    assert [path.name for path in blocks.iterdir()] == ["00000.safetensors"]
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")

    disk = {"activations": "disk"}
    orders = [("run", "two", {}), ("apart", "apart", {}), ("astray", "astray", {}), ("command", "command", {})]
    apart = [("blocks", "blocks_2", {}), ("left", "left", {}), ("blocks", "blocks_disk", disk)]
    orders.append(("formats", "formats", {}))
    two = start(tmp_path, 2, *orders, ("run", "disk", disk), ("run", "columns_2", columns), *apart)
    assert two.returncode == 0, two.stderr
    left = tmp_path / "left" / "out.journal" / "blocks"
    assert [path.name for path in left.iterdir()] == ["00000.safetensors"]
    shutil.copytree(tmp_path / "left", tmp_path / "left_alone")
    apart = [("blocks", "blocks_4", {}), ("blocks", "left", {})]
    four = start(tmp_path, 4, ("run", "four", {}), ("run", "killed", {}), ("run", "columns_4", columns), *apart)
    assert four.returncode == 0, four.stderr
    assert told(tmp_path, "killed", 4) == ["[True, False]"] * 4
    for name in ("two", "four", "killed", "disk"):
        assert hashes(tmp_path / name / "out") == whole, name
        assert read_manifest(tmp_path / name / "out.journal")["numerics"]["micro_batches"] == 4
        assert not (tmp_path / name / "out.journal" / "activations").exists()

    monkeypatch.setenv("RANK", "0")
    from tests.engine.ranked import shared_recipe

    alone = quantize(tmp_path / "source", shared_recipe(tmp_path / "alone"))
    assert [done.resumed for done in alone] == [True, False]
    alone.export()
    assert hashes(tmp_path / "alone" / "out") == whole

    for name in ("columns_2", "columns_4"):
        assert hashes(tmp_path / name / "out") == hashes(tmp_path / "columns_1" / "out"), name
    assert told(tmp_path, "left", 4) == ["[True, False, False]"] * 4
    for name in ("blocks", "left_alone"):
        quantize(tmp_path / "three", shared_recipe(tmp_path / name, parallel="blocks")).export()
    for name in ("left_alone", "left", "blocks_2", "blocks_4", "blocks_disk"):
        assert hashes(tmp_path / name / "out") == hashes(tmp_path / "blocks" / "out"), name

    for text in told(tmp_path, "apart", 2):
        assert text.startswith("UsageError: rank 1: seed: found 1; needed 0")
    for text in told(tmp_path, "formats", 2):
        assert text.startswith("UsageError: rank 1: format: found ('auto_round', 'fake', 'gguf:q4_0'); needed (")
    assert not (tmp_path / "apart").exists()
    assert not (tmp_path / "formats").exists()
    for text in told(tmp_path, "astray", 2):
        assert text.startswith("AutoRoundError: model.layers.1: found other codes on rank 1 than on the others")
    kept = tmp_path / "astray" / "out.journal" / "blocks"
    assert [path.name for path in kept.iterdir()] == ["00000.safetensors"]  # not the block that is in doubt
    assert told(tmp_path, "command", 2) == [f"{tmp_path / 'command' / 'out'}\n", ""]


def test_blocks_tuned_apart_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """They are tuned on float rows: how the first block is stored says nothing about the others."""
    whole = tune(make("llama_3"), tmp_path / "whole", parallel="blocks")
    other = tune(make("llama_3"), tmp_path / "other", parallel="blocks", layer_config={"layers.0": {"bits": 8}})
    chain = tune(make("llama_3"), tmp_path / "chain")
    found, others, chained = codes(whole), codes(other), codes(chain)
    for path, own in found.items():
        first = path.startswith("model.layers.0.")
        assert torch.equal(own.q_OI, others[path].q_OI) == (not first), path
        assert torch.equal(own.q_OI, chained[path].q_OI) == first, path


@pytest.mark.parametrize("settings", [{}, {"activations": "disk"}, {"iters": 0}])
def test_blocks_tuned_apart_go_on_from_the_journal(settings: dict[str, Any], tmp_path: Path) -> None:
    for name in ("whole", "left"):
        made = recipe(tmp_path / name, parallel="blocks", **settings)
        if name == "left":
            assert len(stopped(make("llama_3"), made, after=2)) == 2
        run = quantize(make("llama_3"), made)
        assert [done.resumed for done in run] == [name == "left"] * 2 + [False]
        run.export()
    assert hashes(tmp_path / "left" / "out") == hashes(tmp_path / "whole" / "out")
    with pytest.raises(JournalError, match=r"recipe\.parallel: was 'blocks', now 'data'"):
        list(quantize(make("llama_3"), recipe(tmp_path / "left", **settings)))


# Sums


class Teller(Alone):
    """One of several ranks, whose tensors the others are given afterwards."""

    def __init__(self, rank: int, size: int, shared: dict[int, Tensor]) -> None:
        self.rank, self.size, self._shared = rank, size, shared  # type: ignore[misc]

    def share(self, owners: Sequence[int], tensors: Sequence[Tensor]) -> None:
        for index, (owner, tensor) in enumerate(zip(owners, tensors, strict=True)):
            if owner == self.rank:
                self._shared[index] = tensor.clone()
            elif index in self._shared:
                tensor.copy_(self._shared[index])


@pytest.mark.parametrize("size", range(1, 7))
@pytest.mark.parametrize("count", range(1, 9))
def test_a_sum_has_the_same_bits_for_every_number_of_ranks(count: int, size: int) -> None:
    parts = [{"a": torch.randn(3, 2), "b": torch.randn(()), "c": torch.tensor([3, 2**20])} for _ in range(count)]
    whole = func.sum_in_pairs(parts.__getitem__, 0, count)
    shared: dict[int, Tensor] = {}
    asked: list[list[int]] = [[] for _ in range(size)]

    def sum_of(rank: int) -> Any:
        asked[rank].clear()

        def part(index: int) -> Any:
            asked[rank].append(index)
            return parts[index]

        return summed(Teller(rank, size, shared), part, count, *([parts[0]] if size > count else []))

    for rank in range(size):
        sum_of(rank)  # by the end of it, all have told theirs
    for rank in range(size):
        found = sum_of(rank)
        assert all(torch.equal(found[name], whole[name]) and found[name].dtype == whole[name].dtype for name in whole)
        assert asked[rank] == [index for index, owner in enumerate(owners(count, size)) if owner == rank]


def observed(ranks: Ranks, rows: int, parts: int, asked: list[int]) -> observe.Observed:
    """What two layers are given, with Hessians; ``asked`` is told the rows that this rank ran."""
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Linear(6, 3))
    x_NTD, valid_NT = torch.randn(rows, 5, 4), torch.rand(rows, 5) < 0.8

    class Watched(CallTemplate):
        def bind(self, hidden_BTD: Tensor, rows_B: Tensor) -> func.Call:
            asked.extend(rows_B.tolist())
            return super().bind(hidden_BTD, rows_B)

    leaves, spec = tree_flatten(((Hidden(),), {}))
    inputs = Inputs(Watched(tuple(leaves), spec), Stream(x_NTD, x_NTD), valid_NT)
    specs = dict.fromkeys(("0", "2"), QuantSpec(bits=4, group_size=2))
    passes = Passes(batch_size=2, devices=[torch.device("cpu")], ranks=ranks)
    return passes.observe(
        func.make_block_fn(block), block.state_dict(), specs, inputs, rows=rows, gram=observe.add_gram, parts=parts
    )


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("rows", "parts"), [(16, 4), (7, 4), (5, 2), (2, 4)])
def test_ranks_observe_some_rows_each_and_know_the_same(rows: int, parts: int, size: int) -> None:
    shared: dict[int, Tensor] = {}
    whole = observed(ALONE, rows, parts, [])
    once = observed(ALONE, rows, 1, [])
    asked: list[list[int]] = [[] for _ in range(size)]
    for rank in range(size):
        observed(Teller(rank, size, shared), rows, parts, [])
    for rank in range(size):
        found = observed(Teller(rank, size, shared), rows, parts, asked[rank])
        for mine, theirs, other in zip(found, whole, once, strict=True):
            for path, own in mine.items():
                assert torch.equal(own, theirs[path])
                torch.testing.assert_close(own, other[path])
    every = list(range(rows))
    assert sum(asked, []) == every if min(parts, -(-rows // 2)) >= size else asked == [every] * size  # noqa: RUF017


# Codes and settings


class Told(Alone):
    """The first rank, which is told what the others gave."""

    def __init__(self, *others: Any) -> None:
        self._others = others
        self.size = 1 + len(others)  # type: ignore[misc]

    def gather(self, value: Any) -> list[Any]:
        return [value, *self._others]


@pytest.mark.parametrize(("others", "astray"), [((None, "x"), "2"), (("x",), "1"), (("x", "x"), "0"), ((None,), None)])
def test_the_rank_that_went_astray_is_named(others: tuple[str | None, ...], astray: str | None) -> None:
    codes = {"up": IntCodes(*(torch.ones(1, 1),) * len(IntCodes._fields))}
    seen: list[str] = []

    class Same(Told):
        def gather(self, value: Any) -> list[Any]:
            seen.append(value)
            return [value, *(value if other is None else other for other in others)]

    if astray is None:
        compare(Same(*others), "layers.3", codes)
        return
    with pytest.raises(AutoRoundError, match=rf"^layers\.3: found other codes on rank {astray} than"):
        compare(Same(*others), "layers.3", codes)


def test_ranks_that_were_told_different_things() -> None:
    agree(Told({"bits": 4}), {"bits": 4})
    with pytest.raises(UsageError, match=r"^rank 2: bits: found 2; needed 4, as rank 0 has; start all ranks with"):
        agree(Told({"bits": 4}, {"bits": 2}), {"bits": 4})


# The place of a process


def place(rank: int = 0, size: int = 2) -> Launch:
    return Launch(rank=rank, size=size, local_rank=rank, local_size=size)


def test_where_torchrun_did_not_start_it() -> None:
    assert launched({"RANK": "1", "WORLD_SIZE": "2"}) is None
    assert join(None, "cpu") is ALONE
    assert join(place(size=1), "cpu") is ALONE


@pytest.mark.parametrize(("size", "parts"), [(1, 4), (2, 4), (4, 4), (6, 6)])
def test_parts_of_a_step(size: int, parts: int) -> None:
    assert place(size=size).parts == parts


class Gpus(GpuBackend):
    """Three of them."""

    def count(self) -> int:
        return 3


def test_each_process_has_a_device_of_its_own() -> None:
    gpus = Gpus("cuda")
    any_one, named = (torch.device("cuda"),), (torch.device("cuda", 2), torch.device("cuda", 0))
    assert of_rank(gpus, any_one, place(1)) == (torch.device("cuda", 1),)
    assert of_rank(gpus, named, place(1)) == (torch.device("cuda", 0),)
    assert of_rank(gpus, named, None) == named
    with pytest.raises(UsageError, match=r"^torchrun: found 4 processes on a machine and 3 devices for them"):
        of_rank(gpus, any_one, place(1, size=4))
