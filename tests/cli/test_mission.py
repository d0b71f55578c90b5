"""The command lines that the project is for, run as they are typed, and its table of options.

Stand-ins: a hub in a thread serves a tiny Llama under the name of Qwen3-0.6B, and text of this machine under that of
the default dataset; MODEL is that model, QUANTIZED what the first line wrote. Every line runs its own recipe but for
the flags in ``ADDED``.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from autoround import config, load
from autoround.cli.quantize import parse
from autoround.data.python_docs import python_docs
from autoround.evaluate.settings import Evaluation
from autoround.recipe import PRESETS, Recipe
from tests.evaluate.conftest import float_folder as float_folder
from tests.evaluate.conftest import save_llama
from tests.fakehub import FakeHub

ROOT = Path(__file__).parents[2]
HUB_MODEL, HUB_DATA = "Qwen/Qwen3-0.6B", "NeelNanda/pile-10k"
LINES = {
    "default": "auto-round --model Qwen/Qwen3-0.6B --scheme W4A16 --format auto_round",
    "best": "auto-round-best --model MODEL --scheme W4A16",
    "light": "auto-round-light --model MODEL --scheme W4A16",
    "formats": 'auto-round --model MODEL --bits 4 --group_size 128 --format "auto_round,auto_awq,auto_gptq" '
    "--output_dir OUT",
    "nearest": "auto-round --model MODEL --bits 4 --iters 0",
    "devices": 'auto-round --model MODEL --device_map "0,1,2,3"',
    "evaluate": "auto-round --model QUANTIZED --eval --tasks mmlu,lambada_openai",
}
ADDED = {
    "default": "--seqlen 16 --iters 5",
    "best": "--seqlen 16 --iters 5",
    "light": "--seqlen 16 --iters 5",
    "formats": "--seqlen 16 --iters 5",
    "nearest": "",
    "devices": "--seqlen 16 --iters 5",
    "evaluate": "",
}
# The tasks in place of those that need the network.
SHIPPED = "python_docs_choice,perplexity --limit 4 --eval_seqlen 64"
RUN = """
import contextlib, io, json, sys
from importlib.metadata import entry_points
for words in json.loads(sys.argv[1]):
    sys.argv, out, err = words, io.StringIO(), io.StringIO()
    (command,) = entry_points(group="console_scripts", name=words[0])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = command.load()()
    print(json.dumps({"status": status, "out": out.getvalue(), "err": err.getvalue()}))
"""


def typed(name: str, folder: Path) -> list[str]:
    """The words of a line, which writes to a folder of its own."""
    line = f"{LINES[name]} {ADDED[name]}".replace("MODEL", HUB_MODEL).replace("QUANTIZED", str(folder / "default"))
    words = shlex.split(line.replace("OUT", str(folder / name)))
    return words if "--output_dir" in words or name == "evaluate" else [*words, "--output_dir", str(folder / name)]


@pytest.fixture(scope="module")
def model(float_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose rows groups of 128 divide."""
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder, hidden_size=128, intermediate_size=128)
    PreTrainedTokenizerFast.from_pretrained(float_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the lines write."""
    return tmp_path_factory.mktemp("mission")


@pytest.fixture(scope="module")
def ran(model: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Status, stdout and stderr of each line, in one process with one hub, the evaluation with the tasks we ship."""
    home, data = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("pile")
    (data / "data").mkdir()
    rows = pa.Table.from_pylist([{"text": text} for text in python_docs()[:200]])
    pyarrow.parquet.write_table(rows, data / "data" / "train-00000-of-00001.parquet")
    lines = {name: typed(name, folder) for name in LINES}
    lines["evaluate"] = [*lines["evaluate"][:-1], *SHIPPED.split()]
    with FakeHub(models={HUB_MODEL: model}, datasets={HUB_DATA: data}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", RUN, json.dumps(list(lines.values()))], env=hub.environment(home), cwd=ROOT,
            capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(lines, map(json.loads, done.stdout.splitlines()), strict=True))


def written(folder: Path) -> dict[str, Any]:
    """What a written model says of its quantization; it also has to compute."""
    with torch.no_grad():
        assert torch.isfinite(load(folder)(input_ids=torch.tensor([[1, 5, 9]])).logits).all()
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return settings


@pytest.mark.parametrize("name", ["default", "best", "light", "nearest"])
def test_a_recipe_runs(name: str, ran: dict[str, dict[str, Any]], folder: Path) -> None:
    assert ran[name]["status"] == 0, ran[name]["err"]
    assert ran[name]["out"] == f"{folder / name}\n"
    settings = written(folder / name)
    assert (settings["quant_method"], settings["bits"], settings["group_size"]) == ("auto-round", 4, 128)
    repeated = config.read(folder / f"{name}.journal" / config.NAME)
    preset = PRESETS.get(name, {})
    assert repeated["nsamples"] == preset.get("nsamples", 128)
    assert repeated.get("lr") == preset.get("lr")
    assert repeated["iters"] == (0 if name == "nearest" else 5)
    assert ("calibration: reading text" in ran[name]["err"]) == (name != "nearest")


def test_several_formats_are_written_side_by_side(ran: dict[str, dict[str, Any]], folder: Path) -> None:
    assert ran["formats"]["status"] == 0, ran["formats"]["err"]
    folders = [folder / "formats" / each for each in ("auto_round", "auto_awq", "auto_gptq")]
    assert ran["formats"]["out"] == "".join(f"{each}\n" for each in folders)
    assert [written(each)["quant_method"] for each in folders] == ["auto-round", "awq", "gptq"]
    assert {written(each)["group_size"] for each in folders} == {128}


@pytest.mark.skipif(torch.cuda.device_count() >= 4, reason="needs a machine without four GPUs")
def test_devices_that_are_not_there_are_one_message(ran: dict[str, dict[str, Any]], folder: Path) -> None:
    count = torch.cuda.device_count()
    has = ["no accelerator that torch sees", "one CUDA device, 0", "CUDA devices 0 to 1", "CUDA devices 0 to 2"][count]
    *before, message = ran["devices"]["err"].splitlines()
    assert (ran["devices"]["status"], ran["devices"]["out"]) == (2, "")
    assert message.startswith(
        f"auto-round: error: device_map: found '0,1,2,3'; needed a device of this machine, which has a CPU and {has}"
    )
    assert before == [f"loading: {HUB_MODEL}"]
    assert not list(folder.glob("devices*"))


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
def test_four_devices_run(ran: dict[str, dict[str, Any]], folder: Path) -> None:
    assert ran["devices"]["status"] == 0, ran["devices"]["err"]
    assert written(folder / "devices")["bits"] == 4


def test_a_quantized_model_is_evaluated_on_tasks_that_need_no_network(ran: dict[str, dict[str, Any]]) -> None:
    assert ran["evaluate"]["status"] == 0, ran["evaluate"]["err"]
    tasks = [row.split()[0] for row in ran["evaluate"]["out"].splitlines() if row]
    assert {"perplexity", "python_docs_choice"} <= set(tasks)


@pytest.mark.slow
def test_tasks_that_need_the_network_are_one_message_without_it(ran: dict[str, dict[str, Any]], folder: Path) -> None:
    words = [sys.executable, "-m", "autoround", *typed("evaluate", folder)[1:], "--offline"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    *before, message = done.stderr.splitlines()
    assert before == [f"loading: {folder / 'default'}"]
    assert message.startswith("auto-round: error: task mmlu: its data cannot be read or downloaded (")
    assert "python_docs_cloze, python_docs_choice, python_docs_perplexity, kl and perplexity need no network" in message


# The table of options: words, then what they mean, then the default.
OPTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("--scheme W2A16", {"scheme": "W2A16"}, {"scheme": "W4A16"}),
    ("--bits 3", {"bits": 3}, {"bits": None}),
    ("--group_size -1", {"group_size": -1}, {"group_size": None}),
    (
        "--format auto_round,auto_gptq,auto_awq,llm_compressor,fake,gguf:q4_k_m,gguf:q2_k_s",
        {"format": ("auto_round", "auto_gptq", "auto_awq", "llm_compressor", "fake", "gguf:q4_k_m", "gguf:q2_k_s")},
        {"format": ("auto_round",)},
    ),
    ("--output_dir there", {"output_dir": "there"}, {}),
    (
        "--dataset ./a.jsonl:num=9,b:concat=True,c:apply_chat_template",
        {"dataset": "./a.jsonl:num=9,b:concat=True,c:apply_chat_template"},
        {"dataset": None},  # NeelNanda/pile-10k: the run above asks for it
    ),
    ("--iters 1000", {"iters": 1000}, {"iters": 200}),
    ("--bs 4 --seqlen 512 --nsamples 64", {"batch_size": 4, "seqlen": 512, "nsamples": 64},
     {"batch_size": 8, "seqlen": 2048, "nsamples": 128}),
    ("--lr 0.01", {"lr": 0.01}, {"lr": None}),
    ("--device_map 0,1,2,3", {"device_map": "0,1,2,3"}, {"device_map": "auto"}),
    ("--device_map xpu", {"device_map": "xpu"}, {"device_map": "auto"}),
    ("--low_gpu_mem_usage", {"low_gpu_mem_usage": True}, {"low_gpu_mem_usage": False}),
    ("--enable_torch_compile", {"torch_compile": True}, {"torch_compile": None}),
    ("--quant_lm_head", {"quant_lm_head": True}, {"quant_lm_head": False}),
    ("--adam", {"adam": True}, {"adam": False}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "meaning", "default"), OPTIONS, ids=[words for words, _, _ in OPTIONS])
def test_an_option_of_the_table(words: str, meaning: dict[str, Any], default: dict[str, Any]) -> None:
    assert parse(["--model", "m", *words.split()], "default").recipe == Recipe(model="m", **meaning)
    usual = parse(["--model", "m"], "default").recipe
    assert {name: getattr(usual, name) for name in default} == default


def test_defaults_that_follow_from_others() -> None:
    assert parse(["m"], "default").recipe.spec.group_size == 128
    assert [Recipe(iters=iters).learning_rate(2) for iters in (50, 200)] == [1 / 50, 1 / 200]
    assert [Recipe(iters=iters).learning_rate(4) for iters in (200, 1000)] == [0.5 / 200, 0.5 / 1000]
    assert parse(["m"], "best").recipe.nsamples == 512


def test_options_of_evaluation() -> None:
    words = "m --eval --eval_backend vllm --tasks mmlu,lambada_openai"
    expected = Evaluation(eval=True, eval_backend="vllm", tasks=("mmlu", "lambada_openai"))
    assert parse(words.split(), "default").evaluation == expected
    usual = parse(["m"], "default").evaluation
    assert (usual.eval, usual.eval_backend, usual.tasks) == (False, "hf", ())
