"""A run has one loop over blocks, and it goes through ``autoround.func``."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._dynamo.utils import get_compilation_metrics as compilations

import autoround
from autoround import func
from autoround.journal import Journal
from tests.engine.small import codes, equal_share, make, nearest, tune
from tests.engine.test_run import assert_same

PACKAGE = Path(autoround.__file__).parent


def calls(tree: ast.AST, name: str) -> int:
    """How often a function or method of this name is called."""
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [each.attr if isinstance(each, ast.Attribute) else each.id
             for each in functions if isinstance(each, ast.Attribute | ast.Name)]  # fmt: skip
    return names.count(name)


def test_there_is_one_loop() -> None:
    trees = {file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")}

    def callers(name: str) -> dict[str, int]:
        counts = {file: calls(tree, name) for file, tree in trees.items()}
        return {file: count for file, count in counts.items() if count and not file.startswith("func/")}

    assert callers("tune_block") == {"tuner.py": 1}  # the loop over steps
    # the loop over blocks; and one block of tensors without data, to count what lives at once
    assert callers("tune") == {"loop.py": 1, "forecast/memory.py": 1}
    assert callers("write_block") == {"loop.py": 2}  # after a block, and after the layers outside all blocks
    for name in ("backward", "make_gradient", "fake_quantize"):  # no second tuner
        assert set(callers(name)) <= {"tuner.py"}, name
    assert callers("make_step") == {"forecast/probe.py": 1}  # which times one; the tuner hands it on


class Probe:
    """Notes how the engine uses ``autoround.func``, and returns the parameters it was given as if they were tuned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Any] = []
        self.tuned: list[tuple[Any, int, int]] = []
        self._make_step = func.make_step
        monkeypatch.setattr(func, "make_step", self.make_step)
        monkeypatch.setattr(func, "tune_block", self.tune_block)

    def make_step(self, *args: Any, **settings: Any) -> Any:
        self.made.append(self._make_step(*args, **settings))
        return self.made[-1]

    def tune_block(self, step: Any, weights: Any, state: Any, batches: Any, *, on_step: Any) -> func.TuneResult:
        del on_step  # nothing to tell
        (shared,) = weights.tuned.values()
        self.tuned.append((step, len(shared.weight_OGS), len(list(batches))))
        return func.TuneResult(state.params, torch.zeros(0))


@pytest.mark.parametrize(("name", "steps"), [("llama_3", [0, 0, 0]), ("gemma3", [0, 1, 0])])
def test_the_engine_runs_through_the_functional_tuner(
    name: str, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its codes are those of whatever ``tune_block`` returns, and blocks of one structure share one step."""
    probe, model = Probe(monkeypatch), make(name)
    run = tune(model, tmp_path)
    assert_same(codes(run), nearest(model, run))
    assert [probe.made.index(step) for step, _, _ in probe.tuned] == steps
    assert len(probe.made) == len(set(steps))
    sizes = [
        sum(own.scale_OG.numel() for own in journaled.values())
        for journaled in map(Journal(run.journal_folder, {}).read_block, range(3))
    ]
    assert [groups for _, groups, _ in probe.tuned] == sizes  # one shared tensor for all layers
    assert [count for _, _, count in probe.tuned] == [6, 6, 6]


@pytest.mark.slow
def test_one_compilation_serves_all_blocks(tmp_path: Path) -> None:
    """Beside the step, the clip search compiles what it tries its candidates with."""
    model, settings = make("llama_3"), {"clip_search": True, "lr": 0.01}
    eager = tune(model, tmp_path / "eager", torch_compile=False, **settings)
    torch.compiler.reset()
    counters.clear()
    before = len(compilations())
    compiled = tune(model, tmp_path / "compiled", torch_compile=True, **settings)
    names = sorted(str(metrics.co_name) for metrics in compilations()[before:])
    assert names == ["rounding_errors", "step"]
    assert counters["stats"]["unique_graphs"] == len(names)
    assert not counters["graph_break"]
    assert equal_share(codes(eager), codes(compiled)) > 0.9
    for index in range(3):
        ours, theirs = (Journal(run.journal_folder, {}).read_stats(index) for run in (compiled, eager))
        assert ours["loss_first"] == pytest.approx(theirs["loss_first"], rel=0.1)
