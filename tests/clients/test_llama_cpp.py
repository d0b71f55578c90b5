"""llama.cpp reads the GGUF files of this package."""

import json
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from autoround.formats.gguf.container import GgufTensor, write_gguf
from autoround.formats.gguf.tokenizer import tokenizer_metadata
from tests.clients.environments import client_python
from tests.formats import gguf_tokenizers as small

pytestmark = [pytest.mark.clients, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("complete_gguf.py")
WIDTH, HEADS, HIDDEN, HOLES = 32, 2, 48, 3

_ALL = small.TEXTS + small.LEADING + small.COMBINING
# Name -> a tokenizer, and the texts on which llama.cpp agrees with it.
CASES: dict[str, tuple[Callable[[], PreTrainedTokenizerBase], list[str]]] = {
    **{
        name: (
            partial(small.byte_level, splits, ignore_merges=ignores, bos=name == "llama-bpe"),
            [text for text in _ALL if name not in ("tekken", "gpt-4o") or text not in small.COMBINING],
        )
        for name, (splits, ignores) in small.SPLITS.items()
    },
    **{kind.__name__: (partial(small.of_class, kind), _ALL) for kind in small.CLASSES},
    "llama": (partial(small.sentencepiece, LlamaTokenizer), small.TEXTS + small.COMBINING),
    "llama-normalizer": (small.normalized, _ALL),
    "gemma": (partial(small.sentencepiece, GemmaTokenizer), _ALL),
}


def ask(files: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What llama.cpp answers on files, as ``complete_gguf.py`` tells."""
    python = client_python("llama-cpp")
    if not python.exists():
        pytest.skip(f"no environment {python.parents[1]}; tests/clients/environments.py makes it")
    run = subprocess.run([python, SCRIPT, json.dumps({"files": files})], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    answers: dict[str, dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    for name, found in answers.items():
        assert "error" not in found, f"{name}: {found['error']}\n{run.stderr[-4000:]}"
    return answers


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What llama.cpp makes of the texts, by case."""
    folder, files = tmp_path_factory.mktemp("tokenizers"), {}
    for name, (make, texts) in CASES.items():
        write(folder / f"{name}.gguf", make())
        files[name] = {"path": str(folder / f"{name}.gguf"), "texts": texts}
    return ask(files)


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_tokenizes_alike(name: str, answers: dict[str, dict[str, Any]]) -> None:
    make, texts = CASES[name]
    tokenizer = make()
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert dict(zip(texts, answers[name]["texts"], strict=True)) == dict(zip(texts, plain, strict=True))
    bounded = [tokenizer.encode(text) for text in texts]
    assert dict(zip(texts, answers[name]["bounded"], strict=True)) == dict(zip(texts, bounded, strict=True))


def write(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A Llama of one layer with a tokenizer, and some rows that have no token."""
    rows = len(tokenizer) + HOLES
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "llama.embedding_length": WIDTH,
        "llama.block_count": 1,
        "llama.feed_forward_length": HIDDEN,
        "llama.attention.head_count": HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    shapes = {
        "token_embd": (rows, WIDTH),
        "output": (rows, WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
    }
    shapes |= {f"blk.0.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{part}": (HIDDEN, WIDTH) for part in ("gate", "up")}
    shapes |= {"blk.0.ffn_down": (WIDTH, HIDDEN), "blk.0.ffn_norm": (WIDTH,)}
    tensors = [
        GgufTensor(f"{name}.weight", shape, "f32", lambda shape=shape: [torch.ones(shape)])
        for name, shape in shapes.items()
    ]
    write_gguf(file, metadata | tokenizer_metadata(tokenizer, rows), tensors)
