"""llama.cpp computes from GGUF files of every architecture what transformers computes from the model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.clients.test_llama_cpp import ask
from tests.formats.gguf_models import MODELS, VOCABULARY, make, write_model

pytestmark = [pytest.mark.clients, pytest.mark.slow]

# llama.cpp keeps keys and values in half precision, and looks GELU up in a table of it.
TOLERANCE = 5e-3
TOKENS = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What llama.cpp finds likely after every beginning of the tokens, by model."""
    folder, files = tmp_path_factory.mktemp("models"), {}
    for name in MODELS:
        write_model(make(name), folder / f"{name}.gguf")
        files[name] = {"path": str(folder / f"{name}.gguf"), "prompt": TOKENS[0].tolist(), "top": VOCABULARY}
    return ask(files)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name: str, answers: dict[str, dict[str, Any]]) -> None:
    with torch.no_grad():
        wanted_TV = make(name)(TOKENS).logits[0].log_softmax(-1)
    found_TV = torch.full_like(wanted_TV, torch.nan)
    for position, likeliest in enumerate(answers[name]["logprobs"]):
        for token, logprob in likeliest:
            found_TV[position, token] = logprob
    torch.testing.assert_close(found_TV, wanted_TV, rtol=0, atol=TOLERANCE)


def test_half_precision_files(tmp_path: Path) -> None:
    """The same top tokens where the model's own margin is not below the precision of the file."""
    files = {}
    for dtype in (torch.float16, torch.bfloat16):
        write_model(make("qwen3"), tmp_path / f"{dtype}.gguf", dtype)
        files[str(dtype)] = {"path": str(tmp_path / f"{dtype}.gguf"), "prompt": TOKENS[0].tolist(), "top": 1}
    with torch.no_grad():
        top_T2 = make("qwen3")(TOKENS).logits[0].topk(2)
    clear_T = top_T2.values[:, 0] - top_T2.values[:, 1] > 0.05
    assert clear_T.sum() > 12
    for found in ask(files).values():
        tokens_T = torch.tensor([likeliest[0][0] for likeliest in found["logprobs"]])
        assert torch.equal(tokens_T[clear_T], top_T2.indices[clear_T, 0])
