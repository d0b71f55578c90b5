"""llama.cpp computes from tuned GGUF files of mixtures of experts what their codes stand for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from autoround import tuner
from autoround.engine import quantize
from tests.clients.test_llama_cpp import ask
from tests.engine import mixtures
from tests.engine.small import recipe
from tests.formats.gguf_tokenizers import sentencepiece

pytestmark = [pytest.mark.clients, pytest.mark.slow]

PROMPT, TOP = [417, 317, 342, 500, 512, 530, 320, 333, 480, 390, 611, 388], 64
# llama.cpp rounds what flows into a quantized layer to 8 bits, and a token near the border between two experts may take
# the other one: most errors are as in dense models, of the logits' spread.
MEDIAN_ERROR = 0.1
WIDE: dict[str, Any] = {"vocab_size": 640, "hidden_size": 256, "intermediate_size": 256}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": WIDE | {"sliding_window": None},
    "qwen2_moe": WIDE | {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
    "qwen3_moe": WIDE | {"moe_intermediate_size": 256, "norm_topk_prob": True, "head_dim": 64},
}
FILE_TYPES = ("q4_k_m", "q2_k", "q4_0")


def make(name: str) -> PreTrainedModel:
    model = mixtures.make(name, **MODELS[name])
    model.lm_head.weight.data[:300] = 0  # the client tells nothing after end tokens and single bytes
    return model


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, PreTrainedModel]]:
    """Written files, and models with the weights that their codes stand for."""
    root, found = tmp_path_factory.mktemp("experts"), {}
    for name in MODELS:
        for file_type in FILE_TYPES if name == "mixtral" else FILE_TYPES[:1]:
            own: dict[str, Any] = {"iters": 2, "lr": 1e-3, "bits": None, "group_size": None, "torch_compile": False}
            made = recipe(root / name / file_type, **own, format=(f"gguf:{file_type}",))
            run = quantize(make(name), made, tokenizer=sentencepiece())
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tuner, "STARVED_TOKENS", 1)  # so few tokens would tune no expert
                (folder,) = run.export()
            (file,) = folder.glob("*.gguf")
            found[name, file_type] = file, mixtures.replaced(make(name), run)
    return found


def test_llama_cpp_computes_the_same(ours: dict[tuple[str, str], tuple[Path, PreTrainedModel]]) -> None:
    files = {
        f"{name} {kind}": {"path": str(file), "prompt": PROMPT, "top": TOP} for (name, kind), (file, _) in ours.items()
    }
    theirs = ask(files)
    for (name, kind), (_, model) in ours.items():
        answer = theirs[f"{name} {kind}"]["logprobs"]
        with torch.no_grad():
            log_TV = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
        ids_TN = torch.tensor([[token for token, _ in likeliest] for likeliest in answer])
        found_TN = torch.tensor([[value for _, value in likeliest] for likeliest in answer])
        error_TN = (found_TN - log_TV.gather(1, ids_TN)).abs()
        assert float(error_TN.median()) < MEDIAN_ERROR * float(log_TV[:, 300:].std()), f"{name} {kind}"
