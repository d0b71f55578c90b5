"""llama.cpp computes from our GGUF files, of every file type, what the dequantized model computes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from autoround.formats.gguf.recipes import FILE_TYPES
from tests.clients.test_llama_cpp import ask
from tests.formats.gguf_models import make
from tests.formats.gguf_tokenizers import sentencepiece
from tests.formats.test_gguf_architectures import load
from tests.formats.test_gguf_file import planned

pytestmark = [pytest.mark.clients, pytest.mark.slow]

PROMPT, NEW_TOKENS, TOP = [417, 317, 342, 500, 512, 530, 320, 333, 480, 390, 611, 388], 12, 64
# llama.cpp rounds what flows into a quantized layer to 8 bits, into a bfloat16 one to that: found were 0.035 and 0.006
# of the logits' spread for a file's errors on average, and 0.42 at most.
MEAN_ERROR = {"f16": 0.003, "bf16": 0.02}
MEAN_ERROR_QUANTIZED, LARGEST_ERROR = 0.05, 0.6
WIDE: dict[str, Any] = {"vocab_size": 640, "hidden_size": 256, "intermediate_size": 512}


@dataclass(frozen=True)
class Ours:
    """A written file and the model that transformers reads from it."""

    file: Path
    model: PreTrainedModel


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ours]:
    root, found = tmp_path_factory.mktemp("gguf"), {}
    for name in FILE_TYPES:
        model = make("llama", **WIDE)
        model.lm_head.weight.data[:300] = 0  # the client tells nothing after end tokens and single bytes
        file = planned(model, name, sentencepiece())
        file.write(root / f"{name}.gguf")
        found[name] = Ours(root / f"{name}.gguf", load(root / f"{name}.gguf"))
    return found


@pytest.fixture(scope="module")
def theirs(ours: dict[str, Ours]) -> dict[str, dict[str, Any]]:
    return ask({
        name: {"path": str(own.file), "prompt": PROMPT, "new_tokens": NEW_TOKENS, "top": TOP}
        for name, own in ours.items()
    })  # fmt: skip


@pytest.mark.parametrize("name", FILE_TYPES)
def test_llama_cpp_computes_the_same(name: str, ours: dict[str, Ours], theirs: dict[str, dict[str, Any]]) -> None:
    tokens = theirs[name]["tokens"]
    with torch.no_grad():
        log_TV = ours[name].model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    ids_TN = torch.tensor([[token for token, _ in likeliest] for likeliest in theirs[name]["logprobs"]])
    found_TN = torch.tensor([[value for _, value in likeliest] for likeliest in theirs[name]["logprobs"]])
    error_TN = found_TN - log_TV.gather(1, ids_TN)
    assert float(error_TN.abs().max()) < LARGEST_ERROR
    spread = float(log_TV[:, 300:].std())
    assert float(error_TN.square().mean().sqrt()) < MEAN_ERROR.get(name, MEAN_ERROR_QUANTIZED) * spread


@pytest.mark.parametrize("name", FILE_TYPES)
def test_llama_cpp_generates_the_same(name: str, ours: dict[str, Ours], theirs: dict[str, dict[str, Any]]) -> None:
    """Every greedy token is that of our model too, or ours is as good within the precision above."""
    tokens = theirs[name]["tokens"]
    assert tokens[: len(PROMPT)] == PROMPT
    with torch.no_grad():
        log_TV = ours[name].model(torch.tensor([tokens])).logits[0].log_softmax(-1)[len(PROMPT) - 1 : -1]
    behind_T = log_TV.amax(-1) - log_TV.gather(1, torch.tensor(tokens[len(PROMPT) :])[:, None])[:, 0]
    assert len(behind_T) == NEW_TOKENS
    assert float(behind_T.max()) < LARGEST_ERROR
    assert int((behind_T == 0).sum()) >= NEW_TOKENS - 3
