"""The loaders of other projects read our folders and compute the same."""

import json
import os
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from autoround.formats.packed import PackedLinear
from autoround.hub import load
from tests.clients.cases import CASES, REFUSED
from tests.clients.environments import client_python
from tests.data.words import make_tokenizer
from tests.formats.quantized import quantized

pytestmark = [pytest.mark.clients, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("load_folders.py")
NEW_TOKENS = 12
# GPTQModel does not start on two cores without the first of these.
ENVIRONMENT = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
# auto-round computes in float16: found were differences up to 0.03.
TOLERANCE = 0.05
ALL = CASES | {name: refusal.case for name, refusal in REFUSED.items()}


@dataclass(frozen=True)
class Ours:
    """A written folder and what this package computes from it."""

    folder: Path
    model: PreTrainedModel

    @cached_property
    def tokens(self) -> list[int]:
        """A prompt and its greedy continuation, the most decided of 32, so that float16 does not change a token."""
        prompts_BT = torch.stack((torch.arange(32), torch.full((32,), 17), torch.full((32,), 42)), dim=1)
        output = self.model.generate(
            prompts_BT, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True)  # fmt: skip
        best, second = torch.stack(output.logits).topk(2).values.unbind(-1)
        margins_B = (best - second).min(dim=0).values
        assert margins_B.max() > 2 * TOLERANCE
        return output.sequences[margins_B.argmax()].tolist()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ours]:
    root, found = tmp_path_factory.mktemp("clients"), {}
    for name, case in ALL.items():
        folder = quantized(case.make(), case.form, **case.settings).write(case.form, root / name.replace(":", "-"))
        make_tokenizer().save_pretrained(folder)  # some loaders want one
        found[name] = Ours(folder, load(folder, dtype="float32"))
    return found


@pytest.fixture(scope="module")
def theirs(ours: dict[str, Ours]) -> dict[str, Any]:
    """What the clients compute, by case; one process loads all folders of a loader."""
    found: dict[str, Any] = {}
    for loader, environment in sorted({(case.loader, case.environment) for case in ALL.values()}):
        own = {
            name: ours[name] for name, case in ALL.items() if (case.loader, case.environment) == (loader, environment)
        }
        python = client_python(environment)
        if not python.exists():
            pytest.fail(f"found no {python}; run: python tests/clients/environments.py")
        prompts = {str(each.folder): each.tokens[:-NEW_TOKENS] for each in own.values()}
        request = json.dumps({"loader": loader, "prompts": prompts, "new_tokens": NEW_TOKENS})
        done = subprocess.run([python, SCRIPT, request], env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        answers = json.loads(done.stdout.splitlines()[-1])
        found |= {name: answers[str(each.folder)] for name, each in own.items()}
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_client_computes_the_same(name: str, ours: dict[str, Ours], theirs: dict[str, Any]) -> None:
    own, answer = ours[name], theirs[name]
    assert "error" not in answer, answer["error"]
    config = json.loads((own.folder / "config.json").read_text()).get("quantization_config", {})
    assert config.get("packing_format", CASES[name].form) == CASES[name].layout
    packed = [path for path, module in own.model.named_modules() if isinstance(module, PackedLinear)]
    backend = CASES[name].backend
    assert set(answer["layers"]) == (set(packed) if backend else set())
    assert {module for module in answer["layers"].values() if not module.startswith(backend)} == set()
    assert answer["tokens"] == own.tokens
    torch.testing.assert_close(torch.tensor(answer["logits"]), _logits(own), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", REFUSED)
def test_the_client_refuses(name: str, theirs: dict[str, Any]) -> None:
    assert REFUSED[name].words in theirs[name].get("error", "no error")


def _logits(own: Ours) -> torch.Tensor:
    """Of the prompt and its continuation."""
    with torch.no_grad():
        logits_TV: torch.Tensor = own.model(torch.tensor([own.tokens])).logits[0]
    return logits_TV
