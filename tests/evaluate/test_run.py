"""Whole evaluations of a tiny model: built-in measures and lm-eval's own evaluator on the tasks of this package."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from autoround.engine import quantize
from autoround.errors import ModelError, UsageError
from autoround.evaluate.built_in import read_rows
from autoround.evaluate.opening import is_quantized, open_checkpoint
from autoround.evaluate.run import evaluate, prepare
from autoround.evaluate.scores import compare
from autoround.evaluate.settings import Evaluation
from autoround.hub import load
from autoround.progress import Progress
from tests.engine.test_gguf_run import WIDE, gguf_recipe
from tests.formats.gguf_models import make
from tests.formats.gguf_tokenizers import sentencepiece

SHIPPED = ("python_docs_cloze", "python_docs_choice", "python_docs_perplexity")
SMALL: dict[str, Any] = {"limit": 4, "eval_seqlen": 64}


def test_everything_beside_the_float_model(float_folder: Path, quantized_folder: Path) -> None:
    settings = Evaluation(tasks=("kl", "perplexity", *SHIPPED), reference=str(float_folder), **SMALL)
    told: list[str] = []
    moments: list[Progress] = []
    results = evaluate(
        {"w3": quantized_folder}, prepare(settings, reference=True), reference=float_folder, tell=told.append,
        on_progress=moments.append)  # fmt: skip
    assert [moment.message for moment in moments if not moment.step] == [
        "float, block 1/2", "float, block 2/2", "w3, block 1/2", "w3, block 2/2", "w3, logits",
    ]  # fmt: skip
    assert all(moment.memory_bytes > 0 and moment.phase == "evaluation" for moment in moments)
    assert told == [
        "evaluation: kl, perplexity of float, w3",
        f"evaluation: {', '.join(SHIPPED)} of float",
        f"evaluation: {', '.join(SHIPPED)} of w3",
    ]
    found = json.loads(results.json())
    assert set(found["models"]["w3"]["tasks"]) == {"kl", "perplexity", *SHIPPED}
    assert set(found["models"]["float"]["tasks"]) == {"perplexity", *SHIPPED}
    assert found["text"] == "python-docs:split=test: 4 rows of 64 tokens, 252 predicted"
    _assert_scores(found["models"], settings, float_folder, quantized_folder)
    table = results.table().splitlines()
    assert table[0].split() == ["task", "metric", "float", "w3"]
    assert "python_docs_choice      acc " in results.table()


def _assert_scores(found: dict[str, Any], settings: Evaluation, float_folder: Path, quantized_folder: Path) -> None:
    """The numbers are those of the models in memory, and the worst tokens those of largest divergence."""
    tokenizer = AutoTokenizer.from_pretrained(float_folder)
    rows = read_rows(settings, tokenizer)
    models = {"float": load(float_folder, dtype="float32"), "w3": load(quantized_folder, dtype="float32")}
    expected = compare(models["float"], {"w3": models["w3"]}, rows.tokens_NT)
    measured = {key: found["w3"]["tasks"][key] for key in ("kl", "perplexity")}
    assert measured["kl"]["nats per token"]["value"] == pytest.approx(expected["w3"].kl, abs=1e-4)
    assert measured["kl"]["same top token"]["value"] == pytest.approx(expected["w3"].top1, abs=0.01)
    assert measured["perplexity"]["per token"]["value"] == pytest.approx(expected["w3"].perplexity, rel=1e-4)
    assert found["float"]["tasks"]["perplexity"]["per token"]["value"] == pytest.approx(
        expected["float"].perplexity, rel=1e-4
    )
    worst = found["w3"]["worst_tokens"]
    kl_NT = expected["w3"].kl_P.view(4, 63)
    assert [each["kl"] for each in worst] == pytest.approx(kl_NT.flatten().topk(10).values.tolist(), abs=1e-4)
    first = worst[0]
    assert first["kl"] == pytest.approx(float(kl_NT[first["row"], first["place"] - 1]), abs=1e-4)
    assert first["token"] == tokenizer.decode(rows.tokens_NT[first["row"], first["place"]])
    assert first["context"].endswith(tokenizer.decode(rows.tokens_NT[first["row"], first["place"] - 1]))


@pytest.mark.slow
def test_processes_share_the_text_and_the_questions(float_folder: Path, tmp_path: Path) -> None:
    """After a run, and of a folder that is there."""
    tasks, output = ("kl", "perplexity", *SHIPPED), tmp_path / "out"
    words = ["--tasks", ",".join(tasks), "--limit", "5", "--eval_seqlen", "64", "--eval_bs", "2"]
    run = ["--model", str(float_folder), "--iters", "0", "--group_size", "32", "--output_dir", str(output), "--eval"]
    again = ["eval", str(output), "--reference", str(float_folder), "--eval_output", str(tmp_path / "again.json")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    shown = []
    for command in (run, again):
        done = subprocess.run([*torchrun, "autoround", *command, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        shown.append(done.stdout)
    assert all(text.count("python_docs_choice") == 2 for text in shown)  # one table, acc and acc_norm
    settings = Evaluation(tasks=tasks, limit=5, eval_seqlen=64, eval_bs=2)
    whole = evaluate({"out": output}, prepare(settings, reference=True), reference=float_folder)
    (expected,) = (each.measures for each in whole.models if each.name == "out")
    for file in (tmp_path / "out.evaluation.json", tmp_path / "again.json"):
        found = json.loads(file.read_text())["models"]
        (own,) = (each["tasks"] for name, each in found.items() if name != "float")
        for measure in expected:
            assert own[measure.task][measure.metric]["value"] == pytest.approx(measure.value, rel=1e-4), measure


def test_a_model_alone_has_its_perplexity(quantized_folder: Path) -> None:
    results = evaluate({"w3": quantized_folder}, prepare(Evaluation(eval=True, **SMALL), reference=False))
    (model,) = results.models
    assert [each.task for each in model.measures] == ["perplexity"]
    assert model.worst == ()


def test_what_cannot_work_is_refused_before_any_model_is_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="kl: found no float model to compare with; .*--reference"):
        prepare(Evaluation(tasks="kl"), reference=False)
    with pytest.raises(UsageError, match="eval_output: found no folder .*absent"):
        prepare(Evaluation(eval_output=str(tmp_path / "absent" / "out.json")), reference=True)
    with pytest.raises(UsageError, match="eval_output: found the folder .*; needed a file"):
        prepare(Evaluation(eval_output=str(tmp_path)), reference=True)


def test_checkpoints_are_told_apart(float_folder: Path, quantized_folder: Path, tmp_path: Path) -> None:
    assert not is_quantized(float_folder)
    assert is_quantized(quantized_folder)
    with pytest.raises(ModelError, match="absent"):
        open_checkpoint(tmp_path / "absent")


def test_a_gguf_file_against_the_model_that_it_was_made_of(tmp_path: Path) -> None:
    model, tokenizer = make("llama", **WIDE), sentencepiece()
    model.save_pretrained(tmp_path / "float")
    tokenizer.save_pretrained(tmp_path / "float")
    recipe = gguf_recipe(tmp_path / "out", "gguf:q4_k_m", iters=0, clip_search=False)
    (folder,) = quantize(model, recipe, tokenizer=tokenizer).export()
    assert is_quantized(folder)
    settings = Evaluation(tasks=("kl", "python_docs_cloze"), **SMALL)
    results = evaluate({"q4": folder}, prepare(settings, reference=True), reference=tmp_path / "float")
    found = json.loads(results.json())["models"]["q4"]["tasks"]
    rows = read_rows(settings, tokenizer)
    expected = compare(model, {"q4": load(folder, dtype="float32")}, rows.tokens_NT)["q4"].kl
    assert found["kl"]["nats per token"]["value"] == pytest.approx(expected, rel=1e-3)
    assert 0 <= found["python_docs_cloze"]["acc"]["value"] <= 1
