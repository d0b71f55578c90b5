"""``AutoRound`` as Intel's users call it: tiny models in memory and on disk, every kind of dataset, their arguments."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import autoround
from autoround.errors import UsageError
from autoround.intel.api import AutoRound, Result
from autoround.intel.batches import rows
from autoround.recipe import Recipe
from tests.clients.environments import client_python
from tests.data.words import make_tokenizer, words
from tests.engine import small
from tests.formats.gguf_models import make as make_gguf
from tests.formats.gguf_tokenizers import sentencepiece

IDS = torch.tensor(small.rows())
TINY: dict[str, Any] = {
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "iters": 2,
    "nsamples": small.ROWS,
    "seqlen": small.TOKENS,
    "batch_size": 4,
    "device_map": "cpu",
    "enable_torch_compile": False,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_one_call_writes_what_the_engine_writes(tmp_path: Path) -> None:
    model = small.make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved, folder = AutoRound(model, None, dataset=IDS, **TINY).quantize_and_save(str(tmp_path / "a"), "auto_round")
    recipe = Recipe(bits=4, group_size=32, iters=2, dataset=IDS, nsamples=16, seqlen=16, batch_size=4,
                    device_map="cpu", torch_compile=False, output_dir=str(tmp_path / "b"))  # fmt: skip
    autoround.quantize(model, recipe).export()
    assert folder == str(tmp_path / "a")
    assert small.hashes(tmp_path / "a") == small.hashes(tmp_path / "b")
    assert torch.isfinite(saved(input_ids=IDS[:1]).logits).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_quantize_and_save_in_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "model"
    small.make().save_pretrained(source)
    rounded = AutoRound(str(source), dataset=IDS, **TINY, layer_config={"down_proj": {"bits": 8}})
    model, layers = rounded.quantize()
    assert layers["model.layers.1.mlp.down_proj"] == {"bits": 8, "group_size": 32, "sym": True}
    assert len(layers) == 14
    packed, folder = rounded.save_quantized("out", format="auto_round", inplace=True)
    assert folder == "out"
    with torch.no_grad():
        close = (model(input_ids=IDS[:2]).logits - packed(input_ids=IDS[:2]).logits).abs().max()
    assert float(close) < 1e-3


def test_several_formats_have_a_folder_each(tmp_path: Path) -> None:
    formats = "[auto_round, auto_gptq]"
    _, folders = AutoRound(small.make(), dataset=IDS, **TINY).quantize_and_save(tmp_path / "out", format=formats)
    assert folders == [str(tmp_path / "out" / name) for name in ("auto_round", "auto_gptq")]


def test_a_gguf_scheme_and_what_cannot_be_saved_from_it(tmp_path: Path) -> None:
    rounded = AutoRound(small.make(), dataset=IDS, **TINY | {"scheme": "GGUF:Q4_0", "bits": None, "group_size": None,
                                                             "sym": None})  # fmt: skip
    with pytest.raises(UsageError, match="^scheme: found GGUF:Q4_0 with --format auto_round; needed the format gguf"):
        rounded.quantize_and_save(tmp_path / "out", format="auto_round")
    both = AutoRound(small.make(), dataset=IDS, **TINY, output_dir=tmp_path / "out", format="auto_round,gguf:q4_0")
    both._runs = (None, None)  # type: ignore[assignment]  # as if quantized for both
    with pytest.raises(UsageError, match="^format: found auto_gptq; needed auto_round, gguf:q4_0, what quantize was"):
        both.save_quantized(format="auto_gptq")


def test_a_gguf_file_beside_a_folder(tmp_path: Path) -> None:
    arguments = TINY | {
        "iters": 0,
        "model_free": True,
        "format": "auto_round,gguf:q8_0",
        "output_dir": tmp_path / "out",
    }
    rounded = AutoRound(make_gguf("llama", vocab_size=640), sentencepiece(), **arguments)
    rounded.quantize()
    model, folders = rounded.save_quantized(tmp_path / "other")
    assert folders == [str(tmp_path / "other" / name) for name in ("auto_round", "gguf_q8_0")]
    assert [file.suffix for file in Path(folders[1]).iterdir()] == [".gguf"]
    assert "PackedLinear" in {type(module).__name__ for module in model.modules()}


def test_one_call_writes_where_the_constructor_says(tmp_path: Path) -> None:
    _, folder = AutoRound(small.make(), dataset=IDS, output_dir=tmp_path / "mine", **TINY).quantize_and_save()
    assert folder == str(tmp_path / "mine")


def test_saving_before_quantizing_quantizes(tmp_path: Path) -> None:
    _, folder = AutoRound(small.make(), dataset=IDS, **TINY).save_quantized(tmp_path / "out")
    assert (Path(folder) / "config.json").is_file()


@pytest.mark.parametrize(
    "dataset",
    [
        small.rows(),
        IDS,
        list(IDS),
        [row[None] for row in IDS],
        [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in IDS],
        DataLoader(IDS, batch_size=3),
        DataLoader(torch.utils.data.TensorDataset(IDS), batch_size=3),
        DataLoader([{"input_ids": row} for row in IDS], batch_size=3),
        DataLoader([{"input_ids": row.tolist()} for row in IDS], batch_size=3),
        ({"input_ids": row} for row in IDS),
    ],
    ids=[
        *("lists", "tensor", "tensors", "rows of one", "encodings", "loader", "tuples", "mappings", "lists in loaders"),
        "generator",
    ],
)
def test_every_kind_of_token_ids_gives_the_same_rows(dataset: Any) -> None:
    found = AutoRound(small.make(), dataset=dataset, **TINY).recipe.dataset
    given = [torch.as_tensor(row).flatten() for row in found]
    assert torch.equal(torch.stack(given), IDS)


def test_a_loader_is_read_no_further_than_needed_and_padding_is_dropped() -> None:
    def batches() -> Any:
        yield {
            "input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
            "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        }
        raise AssertionError("read too far")

    assert [row.tolist() for row in rows(batches(), 2)] == [[5, 6], [7, 8, 9]]
    listed = [{"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1]}, {"input_ids": [7, 8], "attention_mask": [1, 1]}]
    assert rows(listed, 2) == [[5, 6], [7, 8]]
    assert [row.tolist() for row in rows(DataLoader(listed[:1]), 1)] == [[5, 6]]


def test_texts_need_the_tokenizer_and_it_is_saved_with_the_model(tmp_path: Path) -> None:
    texts, tokenizer = [words(20, first) for first in range(8)], make_tokenizer()
    model = small.make(vocab_size=len(tokenizer))
    for name, dataset in (("a", texts), ("b", DataLoader(texts, batch_size=4))):
        settings = TINY | {"nsamples": 8, "seqlen": 8}
        _, folder = AutoRound(model, tokenizer, dataset=dataset, **settings).quantize_and_save(tmp_path / name)
        assert (Path(folder) / "tokenizer_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ({}, {}),
        ({"iters": None, "lr": None, "dataset": None, "enable_torch_compile": None}, {}),
        ({"scheme": "W2A16", "asym": True}, {"scheme": "W2A16", "sym": False}),
        ({"scheme": {"bits": 2, "group_size": 64, "data_type": "int", "act_bits": 16}}, {"bits": 2, "group_size": 64}),
        ({"scheme": "gguf:q4_k_m"}, {"format": ("gguf:q4_k_m",)}),
        ({"not_use_best_mse": False, "enable_adam": True}, {"keep": "best", "adam": True}),
        ({"model_free": True}, {"iters": 0, "clip_search": False}),
        ({"iters": 0, "disable_opt_rtn": False}, {"iters": 0, "clip_search": True}),
        ({"amp": True, "enable_quanted_input": True, "nblocks": 1, "platform": "hf", "sampler": "rand"}, {}),
        ({"device": 0, "train_bs": 2}, {"device_map": "0", "batch_size": 2}),
        ({"ignore_layers": "mlp", "to_quant_block_names": ["layers.0"]},
         {"ignore_layers": ("mlp", r"^(?!.*(?:layers.0(?!\d)))")}),
    ],
    ids=str,
)  # fmt: skip
def test_their_arguments(arguments: dict[str, Any], fields: dict[str, Any]) -> None:
    found = AutoRound("m", **arguments).recipe
    assert found == Recipe(**{"model": "m", "output_dir": "tmp_autoround"} | fields)


def test_what_means_nothing_here_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "autoround"):
        AutoRound("m", low_cpu_mem_usage=True)
    assert caplog.messages == ["AutoRound: low_cpu_mem_usage: blocks are read one at a time, with or without it"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"enable_quanted_input": False}, UsageError, "--disable_quanted_input: not available: each block is tuned on"),
        ({"act_bits": 8}, UsageError, "--act_bits: found 8; needed 16 or 32: activations stay in 16 bits"),
        ({"scheme": "NVFP4"}, UsageError, "scheme: found NVFP4; floating-point weights are out of scope"),
        ({"bits": 5}, UsageError, "bits: found 5; needed one of 2, 3, 4, 8"),
        ({"model_free": True, "iters": 9}, UsageError, "--model_free: found iters 9 beside it; needed 0"),
        ({"itres": 9}, TypeError, r"AutoRound\(\) got an unexpected keyword argument 'itres'; did you mean 'iters'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        AutoRound("m", **arguments)


def test_a_pair_is_two() -> None:
    pair = Result(torch.nn.Identity, "folder")
    assert (len(pair), pair[-1]) == (2, "folder")
    assert pair[0] is pair[-2]
    with pytest.raises(IndexError, match="found index 2; needed 0, the model, or 1"):
        pair[2]


def test_it_is_a_public_name() -> None:
    assert autoround.AutoRound is AutoRound


@pytest.mark.clients
@pytest.mark.slow
@pytest.mark.parametrize("first", ["autoround", "auto_round"])
def test_both_packages_in_one_process(first: str, tmp_path: Path) -> None:
    python = client_python("auto-round")
    if not python.is_file():
        pytest.skip("no environment of auto-round; see tests/clients/environments.py")
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    done = subprocess.run(
        [sys.executable, "-m", "tests.beside_auto_round", str(site), first, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "autoround.load of autoround": "autoround",
        "autoround.load of auto_round": "autoround",
        "transformers' of autoround": "auto_round_extension",
        "transformers' of auto_round": "auto_round_extension",
    }


def test_only_named_blocks_are_quantized() -> None:
    blocks = AutoRound(small.make(), dataset=IDS, **TINY, to_quant_block_names="model.layers.1")
    assert {path.split(".")[2] for path in autoround.quantize(small.make(), blocks.recipe).plan.specs} == {"1"}
