"""The command on a real model: SmolLM2-135M-Instruct from its GGUF file to a folder that generates text."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._dynamo.utils import get_compilation_metrics as compilations
from transformers import AutoTokenizer

from autoround.cli.main import main
from autoround.hub import load
from benchmarks import smollm2

LINE = (
    "--bits 4 --group_size 64 --dataset python-docs --nsamples 8 --seqlen 64 --batch_size 4 --iters 2 --lr 0.01 "
    "--enable_torch_compile"
)


@pytest.mark.slow
def test_one_compilation_serves_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of the step and one of the clip search, whatever else happens between argv and the checkpoint."""
    torch.compiler.reset()
    counters.clear()
    before = len(compilations())
    assert main([str(smollm2.gguf_path()), *LINE.split(), "--output_dir", str(tmp_path / "out")]) == 0
    names = sorted(str(metrics.co_name) for metrics in compilations()[before:])
    assert names == ["rounding_errors", "step"]
    assert counters["stats"]["unique_graphs"] == len(names)
    assert not counters["graph_break"]

    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'out'}\n"
    assert printed.err.count("block ") == 30
    assert "warning" not in printed.err

    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "out"), load(tmp_path / "out", dtype="float32")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
