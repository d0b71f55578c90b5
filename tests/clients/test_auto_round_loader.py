"""Intel's own loader reads our folders and computes the same."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from autoround.formats.packed import PackedLinear
from autoround.hub import load
from tests.clients.make_client_venv import client_python
from tests.formats.quantized import quantized, tiny_gpt2, tiny_llama

pytestmark = [pytest.mark.clients, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("load_with_auto_round.py")
NEW_TOKENS = 12
# The client computes in float16: found were differences up to 0.03.
TOLERANCE = 0.05

Make = Callable[[], PreTrainedModel]


def _llama_with_zero_points_of_0() -> PreTrainedModel:
    """Groups without negative weights start at code 0."""
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.down_proj").weight.abs_()
    return model


# Layout, model, storage.
CASES: dict[str, tuple[str, Make, dict[str, Any]]] = {
    **{f"sym-{bits}": ("auto_round", lambda: tiny_llama(bias=True), {"bits": bits}) for bits in (2, 3, 4, 8)},
    **{
        f"asym-{bits}": ("auto_round", _llama_with_zero_points_of_0, {"bits": bits, "sym": False})
        for bits in (2, 3, 4, 8)
    },
    "whole-rows": ("auto_round", tiny_llama, {"group_size": -1}),
    "mixed-groups": ("auto_round", tiny_llama, {"group_size": 64}),
    "kept-layers": ("auto_round", lambda: tiny_llama(intermediate=80), {}),
    "tied-conv1d": ("auto_round", tiny_gpt2, {}),
    "gptq": ("auto_gptq", tiny_llama, {}),
    "gptq-kept-layers": ("auto_gptq", lambda: tiny_llama(intermediate=80), {"bits": 3}),
}


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
    root = tmp_path_factory.mktemp("clients")
    folders = {
        name: quantized(make(), form, **settings).write(form, root / name)
        for name, (form, make, settings) in CASES.items()
    }
    return {name: Ours(folder, load(folder, dtype="float32")) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def theirs(ours: dict[str, Ours]) -> dict[str, Any]:
    """What the client computes, by case; one process loads all folders."""
    python = client_python()
    if not python.exists():
        pytest.fail(f"found no {python}; run: python tests/clients/make_client_venv.py")
    prompts = {str(own.folder): own.tokens[:-NEW_TOKENS] for own in ours.values()}
    request = json.dumps({"prompts": prompts, "new_tokens": NEW_TOKENS})
    done = subprocess.run([python, SCRIPT, request], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    return {name: answers[str(own.folder)] for name, own in ours.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_client_computes_the_same(name: str, ours: dict[str, Ours], theirs: dict[str, Any]) -> None:
    own, answer = ours[name], theirs[name]
    packed = [path for path, module in own.model.named_modules() if isinstance(module, PackedLinear)]
    backend = "qlinear_torch_zp" if CASES[name][2].get("sym", True) else "qlinear_torch"
    assert answer["layers"] == dict.fromkeys(packed, f"auto_round_extension.torch.{backend}")
    assert answer["tokens"] == own.tokens
    with torch.no_grad():
        logits_TV = own.model(torch.tensor([own.tokens])).logits[0]
    torch.testing.assert_close(torch.tensor(answer["logits"]), logits_TV, rtol=0, atol=TOLERANCE)
