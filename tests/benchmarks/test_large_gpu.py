"""Seconds a block are those between a tool's lines; a tool that does not end is ended."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from benchmarks import large_gpu, peers
from benchmarks.cost import Failed
from benchmarks.peers import Job, Tool

LINES = "import time\nfor n in 1, 2, 3: time.sleep(0.4); print(f'block {n}/3  model.layers.{n}  1.0 s', flush=True)"


def settle(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Let a program stand for autoround."""
    tool = Tool(version="stands for it", recipes={"default": lambda job: ["python3", "-c", program]})
    monkeypatch.setitem(peers.TOOLS, "autoround", tool)


def test_blocks_take_what_lies_between_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = large_gpu.parse(["--device", "cpu", "--hidden", "128", "--blocks", "3", "--rows", "2", "--seqlen", "8"])
    job = large_gpu.make_job(options, tmp_path)
    config = AutoConfig.from_pretrained(job.source)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (3, 128, 448)
    assert len(job.texts.read_text().splitlines()) == 2
    settle(monkeypatch, LINES)
    found = large_gpu.run_case("autoround", job, tmp_path, 60)
    assert len(found["blocks"]) == 2 and found["block"] == pytest.approx(0.4, abs=0.15)
    assert found["seconds"] > found["first"] > 0.3 and found["gpu_gigabytes"] is None
    assert f"{found['block']:.2f} s a block" in large_gpu.line("autoround", found)


def test_a_tool_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch, "import time; time.sleep(60)")
    job = Job(source=tmp_path, texts=tmp_path, tokens=tmp_path, output=tmp_path, bits=4, group_size=128, sym=True,
              rows=1, seqlen=1, seed=0)  # fmt: skip
    with pytest.raises(Failed, match="ended after 1 s"):
        large_gpu.run_case("autoround-low", job, tmp_path, 0.6)
