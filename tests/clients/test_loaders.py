"""The loaders of other projects read our folders and compute the same."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from autoround.formats.packed import PackedLinear
from autoround.hub import load
from tests.clients.environments import client_python
from tests.data.words import make_tokenizer
from tests.formats.quantized import quantized, tiny_gpt2, tiny_llama

pytestmark = [pytest.mark.clients, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("load_folders.py")
NEW_TOKENS = 12
# GPTQModel does not start on two cores without the first of these.
ENVIRONMENT = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
# auto-round computes in float16: found were differences up to 0.03.
TOLERANCE = 0.05

Make = Callable[[], PreTrainedModel]


# Widths, groups and kept layers of two blocks; q, k and v agree, as do gate and up: some clients run them as one.
MIXED: dict[str, Any] = {
    "layers.0.self_attn.[qkv]_proj": {"bits": 8},
    "layers.1.self_attn": {"bits": 8, "group_size": 16},
    "layers.1.mlp.(gate|up)": {"bits": 2, "group_size": -1},
    "model.layers.1.mlp.down_proj": "keep",
}


def _llama_with_zero_points_of_0() -> PreTrainedModel:
    """Groups without negative weights start at code 0."""
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.down_proj").weight.abs_()
    return model


@dataclass(frozen=True)
class Case:
    """A folder, and the loader that reads it in an environment with modules whose names begin with ``backend``."""

    loader: str
    form: str
    make: Make = tiny_llama
    settings: dict[str, Any] = field(default_factory=dict)
    backend: str = ""
    environment: str = "auto-round"


# Loader and environment -> who that is.
CLIENTS = {
    ("auto_round", "auto-round"): "auto-round 0.16.1",
    ("transformers", "auto-round"): "transformers 5.23 with compressed-tensors 0.20",
    ("compressed_tensors", "auto-round"): "compressed-tensors 0.20",
    ("gptqmodel", "gptqmodel"): "GPTQModel 7.7",
    ("transformers", "gptqmodel"): "transformers 5.23 with optimum 2.3 and GPTQModel 7.7",
}


def _intel(form: str, make: Make = tiny_llama, **settings: Any) -> Case:
    torch_backend = "qlinear_torch" + ("" if form == "auto_round:gptqmodel" else "_zp")
    return Case("auto_round", form, make, settings, f"auto_round_extension.torch.{torch_backend}")


def _gptqmodel(form: str, make: Make = tiny_llama, **settings: Any) -> Case:
    return Case("gptqmodel", form, make, settings, "gptqmodel.nn_modules.qlinear.", "gptqmodel")


def _transformers(form: str, make: Make = tiny_llama, **settings: Any) -> Case:
    """With the packages that transformers asks for to read these layouts: optimum and GPTQModel."""
    return Case("transformers", form, make, settings, "gptqmodel.nn_modules.qlinear.", "gptqmodel")


def _compressed(make: Make = tiny_llama, **settings: Any) -> Case:
    """Through transformers where the codes are symmetric; its loader expects unpacked zero points and refuses the
    packed ones that compressed-tensors 0.20 itself writes, so that the library reads asymmetric ones here."""
    if settings.get("sym", True):
        return Case("transformers", "llm_compressor", make, settings, "torch.nn.modules.linear")
    return Case("compressed_tensors", "llm_compressor", make, settings)


CASES: dict[str, Case] = {
    **{f"intel-sym-{bits}": _intel("auto_round", lambda: tiny_llama(bias=True), bits=bits) for bits in (2, 3, 4, 8)},
    **{
        f"intel-asym-{bits}": _intel("auto_round:gptqmodel", _llama_with_zero_points_of_0, bits=bits, sym=False)
        for bits in (2, 3, 4, 8)
    },
    "intel-whole-rows": _intel("auto_round", group_size=-1),
    "intel-mixed-groups": _intel("auto_round", group_size=64),
    "intel-kept-layers": _intel("auto_round", lambda: tiny_llama(intermediate=80)),
    "intel-tied-conv1d": _intel("auto_round", tiny_gpt2),
    "intel-mixed-bits": _intel("auto_round", layers=MIXED | {"layers.0.mlp.down": {"bits": 3}}),
    "intel-asym-mixed-bits": _intel("auto_round:gptqmodel", sym=False, layers=MIXED | {"layers.0.mlp": {"sym": True}}),
    "intel-quantized-head": _intel("auto_round", lambda: tiny_llama(tied=True), head=True),
    "intel-asym-quantized-head": _intel(
        "auto_round:gptqmodel", sym=False, head=True, layers={"lm_head": {"bits": 8, "group_size": 16}}
    ),
    "intel-tied-conv1d-quantized-head": _intel("auto_round", tiny_gpt2, head=True),
    "intel-gptq": _intel("auto_gptq"),
    "intel-gptq-kept-layers": _intel("auto_gptq", lambda: tiny_llama(intermediate=80), bits=3),
    **{
        f"compressed-{'sym' if sym else 'asym'}-{bits}": _compressed(lambda: tiny_llama(bias=True), bits=bits, sym=sym)
        for bits in (2, 4, 8)
        for sym in (True, False)
    },
    # Asymmetric codes of version 1 it takes from itself only.
    **{
        f"gptqmodel-{form}-{'sym' if sym else 'asym'}-{bits}": _gptqmodel(
            form, lambda: tiny_llama(bias=True), bits=bits, sym=sym
        )
        for form, sym in (("auto_gptq", True), ("gptq_v2", True), ("gptq_v2", False))
        for bits in (2, 3, 4, 8)
    },
    "gptqmodel-zero-points-of-0": _gptqmodel("gptq_v2", _llama_with_zero_points_of_0, sym=False),
    "gptqmodel-kept-layers": _gptqmodel("auto_gptq", lambda: tiny_llama(intermediate=80), bits=3),
    "gptqmodel-mixed-bits": _gptqmodel("auto_gptq", layers=MIXED | {"layers.0.mlp.down": {"bits": 3}}),
    "gptqmodel-asym-mixed-bits": _gptqmodel("gptq_v2", sym=False, layers=MIXED | {"layers.0.mlp": {"sym": True}}),
    "gptqmodel-awq-sym": _gptqmodel("auto_awq", lambda: tiny_llama(bias=True)),
    "gptqmodel-awq-asym": _gptqmodel("auto_awq", _llama_with_zero_points_of_0, sym=False),
    "gptqmodel-awq-kept-layers": _gptqmodel("auto_awq", lambda: tiny_llama(intermediate=80)),
    **{
        f"transformers-gptq-{'sym' if sym else 'asym'}-{bits}": _transformers(
            "auto_gptq", lambda: tiny_llama(bias=True), bits=bits, sym=sym
        )
        for bits in (2, 3, 4, 8)
        for sym in (True, False)
    },
    "transformers-gptq-kept-layers": _transformers("auto_gptq", lambda: tiny_llama(intermediate=80)),
    "transformers-awq-sym": _transformers("auto_awq", lambda: tiny_llama(bias=True)),
    "transformers-awq-asym": _transformers("auto_awq", _llama_with_zero_points_of_0, sym=False),
    "transformers-awq-kept-layers": _transformers("auto_awq", lambda: tiny_llama(intermediate=80)),
    "compressed-whole-rows": _compressed(group_size=-1),
    "compressed-mixed-groups": _compressed(_llama_with_zero_points_of_0, group_size=64, sym=False),
    "compressed-mixed-bits": _compressed(layers=MIXED),
    "compressed-asym-mixed-bits": _compressed(sym=False, layers=MIXED | {"layers.0.mlp": {"sym": True}}),
    "compressed-kept-layers": _compressed(lambda: tiny_llama(intermediate=80)),
    "compressed-bfloat16-scales": _compressed(scale_dtype="bfloat16"),
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
        name: quantized(case.make(), case.form, **case.settings).write(case.form, root / name)
        for name, case in CASES.items()
    }
    for folder in folders.values():  # some loaders want one
        make_tokenizer().save_pretrained(folder)
    return {name: Ours(folder, load(folder, dtype="float32")) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def theirs(ours: dict[str, Ours]) -> dict[str, Any]:
    """What the clients compute, by case; one process loads all folders of a loader."""
    found: dict[str, Any] = {}
    for loader, environment in sorted({(case.loader, case.environment) for case in CASES.values()}):
        own = {
            name: ours[name] for name, case in CASES.items() if (case.loader, case.environment) == (loader, environment)
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
    packed = [path for path, module in own.model.named_modules() if isinstance(module, PackedLinear)]
    backend = CASES[name].backend
    assert set(answer["layers"]) == (set(packed) if backend else set())
    assert {module for module in answer["layers"].values() if not module.startswith(backend)} == set()
    assert answer["tokens"] == own.tokens
    with torch.no_grad():
        logits_TV = own.model(torch.tensor([own.tokens])).logits[0]
    torch.testing.assert_close(torch.tensor(answer["logits"]), logits_TV, rtol=0, atol=TOLERANCE)
