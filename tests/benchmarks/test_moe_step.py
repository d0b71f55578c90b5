"""The time of a step is what many steps take longer than few."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from benchmarks import moe_step
from benchmarks.cost import Cost
from benchmarks.peers import OURS, THEIRS, Job


def test_a_step_is_what_many_take_longer_than_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, str]] = []

    def run_tool(name: str, job: Job, iters: int, folder: Path, place: str) -> Cost:
        asked.append((name, iters, place))
        assert (folder / "model" / "config.json").is_file() and len(job.texts.read_text().splitlines()) == job.rows
        slower = 3 if name == THEIRS else 1
        noise = 40.0 if place == "1" and iters == 20 else 0.0
        return Cost(10 + 0.5 * slower * iters + noise, 2.0 * slower, 0)

    monkeypatch.setattr(moe_step, "run_tool", run_tool)
    options = moe_step.parse(["--rounds", "3", "--iters", "10", "20", "--experts", "4", "--rows", "5"])
    found = moe_step.measured(options, tmp_path)
    assert found[OURS] == {"steps": [0.5, 4.5, 0.5], "gigabytes": 2.0, "step": 0.5}
    assert found[THEIRS]["step"] == 1.5
    assert [name for name, _, _ in asked] == [OURS, THEIRS, *[OURS, OURS, THEIRS, THEIRS] * 3]
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert (config.num_experts, config.hidden_size, config.moe_intermediate_size) == (4, 256, 128)
