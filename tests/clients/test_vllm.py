"""vLLM on a CPU reads our folders: it computes the same on those that it takes, and says why it refuses the others."""

import json
import os
import subprocess
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from autoround.formats.packed import PackedLinear
from autoround.hub import load
from tests.clients.cases import Case, Make
from tests.clients.environments import client_python
from tests.clients.test_loaders import NEW_TOKENS, TOLERANCE, Ours
from tests.data.words import make_tokenizer
from tests.engine import mixtures
from tests.formats.quantized import quantized

SCRIPT = Path(__file__).with_name("generate_vllm.py")
# Loader and environment -> who that is.
CLIENTS = {("vllm", "vllm"): "vLLM 0.32 on a CPU"}
# Scored beside the sequences that models generate.
ROWS = torch.randint(128, (4, 24), generator=torch.Generator().manual_seed(0)).tolist()
# vLLM's name of a layer -> the layers of the file that it joins.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


NO_AVX512 = "this processor has no AVX-512, without which vLLM has no kernel for integer weights on a CPU"


def has_avx512() -> bool:
    """Whether Linux says that the processor has it."""
    file = Path("/proc/cpuinfo")
    return file.exists() and "avx512f" in file.read_text().split()


pytestmark = [pytest.mark.clients, pytest.mark.slow, pytest.mark.skipif(not has_avx512(), reason=NO_AVX512)]


def _llama(*, intermediate: int = 96, bias: bool = False) -> PreTrainedModel:
    """With heads of 64, as vLLM's attention needs, and a down_proj that groups of 64 do not divide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=intermediate, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, attention_bias=bias, initializer_range=0.2, bos_token_id=1,
        eos_token_id=2)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _llama_with_zero_points_of_0() -> PreTrainedModel:
    """Groups without negative weights start at code 0."""
    model = _llama(bias=True)
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.down_proj").weight.abs_()
    return model


def _mixture() -> PreTrainedModel:
    return mixtures.make("qwen3_moe", vocab_size=128, hidden_size=128, num_attention_heads=2, num_key_value_heads=1,
                         head_dim=64, moe_intermediate_size=64, max_position_embeddings=64)  # fmt: skip


def _case(method: str, form: str, make: Make = _llama, **settings: Any) -> Case:
    return Case("vllm", form, make, settings, method, "vllm")


_gptq = partial(_case, "AutoGPTQLinearMethod")
_awq = partial(_case, "AutoAWQMarlinLinearMethod", "auto_awq")
_intel = partial(_case, "INCLinearMethod", "auto_round")
_compressed = partial(_case, "CompressedTensorsLinearMethod", "llm_compressor")
_KEPT, _EXPERTS = {"layers.0.mlp.down_proj": {"bits": 16}}, {r"mlp\.experts\.": {"bits": 16}}

CASES: dict[str, Case] = {
    "vllm-gptq": _gptq("auto_gptq", lambda: _llama(bias=True)),
    "vllm-gptq-whole-rows": _gptq("auto_gptq", group_size=-1),
    "vllm-gptq-kept-layers": _gptq("auto_gptq", layers=_KEPT),
    "vllm-gptq-kept-experts": _gptq("auto_gptq", _mixture, layers=_EXPERTS),
    "vllm-gptq-mixed-groups": _gptq("auto_gptq", group_size=64, layers={"layers.0": {"group_size": 32}}),
    "vllm-gptq-v2": _gptq("gptq_v2"),
    "vllm-awq-sym": _awq(lambda: _llama(bias=True)),
    "vllm-awq-sym-kept-layers": _awq(lambda: _llama(bias=True), layers=_KEPT),
    "vllm-awq-kept-experts": _awq(_mixture, layers=_EXPERTS),
    "vllm-awq-asym-points-of-0": _awq(_llama_with_zero_points_of_0, sym=False),
    "vllm-intel": _intel(lambda: _llama(bias=True)),
    "vllm-intel-kept-layers": _intel(layers=_KEPT),
    "vllm-intel-kept-experts": _intel(_mixture, layers=_EXPERTS),
    "vllm-intel-mixed-groups": _intel(group_size=64),
    "vllm-intel-quantized-head": _intel(head=True),
    "vllm-intel-asym-points-of-0": _intel(_llama_with_zero_points_of_0, sym=False),
    "vllm-intel-asym-quantized-head": _intel(sym=False, head=True),
    "vllm-compressed": _compressed(lambda: _llama(bias=True)),
    "vllm-compressed-whole-rows": _compressed(group_size=-1),
    "vllm-compressed-kept-layers": _compressed(layers=_KEPT),
    "vllm-compressed-kept-experts": _compressed(_mixture, layers=_EXPERTS),
    "vllm-compressed-bfloat16-scales": _compressed(scale_dtype="bfloat16"),
    "vllm-compressed-asym-points-of-0": _compressed(_llama_with_zero_points_of_0, sym=False),
    "vllm-compressed-asym-mixed-groups": _compressed(sym=False, group_size=64, layers={"layers.0": {"sym": True}}),
    "vllm-fake": _case("", "fake", bits=3, sym=False),
}
# What vLLM answers where it takes a layout, but not on a CPU with these codes.
_NO_KERNEL, _NOT_GPTQ, _NOT_INTEL, _NOT_MARLIN = (
    "Failed to find a kernel that can implement the WNA16 linear layer",
    "Unsupported quantization config: bits={bits}, sym={sym}",
    "INC on CPU: unsupported config INCLayerConfig(bits={bits}, group_size=32, sym={sym}",
    "Marlin does not support weight_bits = uint8b128",
)
REFUSED: dict[str, tuple[Case, str]] = {
    **{
        f"{form}-{'sym' if sym else 'asym'}-{bits}": (_gptq(form, bits=bits, sym=sym), _NOT_GPTQ)
        for form in ("auto_gptq", "gptq_v2")
        for bits, sym in ((2, True), (3, True), (2, False), (3, False), (4, False), (8, False))
    },
    "auto_gptq-sym-8": (_gptq("auto_gptq", bits=8), _NOT_MARLIN),
    "gptq_v2-sym-8": (_gptq("gptq_v2", bits=8), _NOT_MARLIN),
    "gptq-groups-of-16": (_gptq("auto_gptq", group_size=16), "Marlin does not support group_size = 16"),
    "gptq-kept-part": (
        _gptq("auto_gptq", layers={"layers.0.self_attn.q_proj": {"bits": 16}}),
        "Detected some but not all shards of model.layers.0.self_attn.qkv_proj",
    ),
    **{f"intel-sym-{bits}": (_intel(bits=bits), _NOT_INTEL) for bits in (2, 3, 8)},
    "intel-asym-8": (_intel(bits=8, sym=False), "Unsupported packing_format: auto_round,"),
    "intel-gptqmodel-sym-4": (_case("", "auto_round:gptqmodel"), "Unsupported packing_format: auto_round:gptqmodel"),
    **{
        f"intel-gptq-asym-{bits}": (_case("", "auto_round:auto_gptq", bits=bits, sym=False), _NOT_INTEL)
        for bits in (2, 3, 4, 8)
    },
    "intel-awq-sym-4": (_case("", "auto_round:auto_awq"), "has no attribute 'awq_gemm'"),
    "compressed-sym-2": (_compressed(bits=2), _NO_KERNEL),
    "compressed-sym-8": (_compressed(bits=8), _NO_KERNEL),
    "compressed-asym-2": (_compressed(bits=2, sym=False), _NO_KERNEL),
    "compressed-asym-8": (_compressed(bits=8, sym=False), _NO_KERNEL),
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ours]:
    root, found = tmp_path_factory.mktemp("vllm"), {}
    for name, case in (CASES | {name: case for name, (case, _) in REFUSED.items()}).items():
        folder = quantized(case.make(), case.form, **case.settings).write(case.form, root / name)
        make_tokenizer().save_pretrained(folder)
        found[name] = Ours(folder, load(folder, dtype="float32"))
    return found


@pytest.fixture(scope="module")
def theirs(ours: dict[str, Ours]) -> dict[str, Any]:
    """What vLLM computes, by case; one process loads all folders."""
    python = client_python("vllm")
    if not python.exists():
        pytest.fail(f"found no {python}; run: python tests/clients/environments.py")
    request = {
        "prompts": {str(own.folder): [own.tokens[:-NEW_TOKENS]] for own in ours.values()},
        "rows": {str(own.folder): [own.tokens, *ROWS] for own in ours.values()},
        "new_tokens": NEW_TOKENS,
    }
    command, environment = [python, SCRIPT, json.dumps(request)], {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    return {name: answers[str(own.folder)] for name, own in ours.items()}


@pytest.mark.parametrize("name", CASES)
def test_vllm_computes_the_same(name: str, ours: dict[str, Ours], theirs: dict[str, Any]) -> None:
    own, answer = ours[name], theirs[name]
    assert "error" not in answer, answer["error"]
    packed = {path for path, module in own.model.named_modules() if isinstance(module, PackedLinear)}
    assert _parts(answer["layers"]) == packed
    assert set(answer["layers"].values()) == ({CASES[name].backend} if packed else set())
    assert answer["tokens"] == [own.tokens]
    for row, found in zip([own.tokens, *ROWS], answer["log_probabilities"], strict=True):
        torch.testing.assert_close(torch.tensor(found), _log_probabilities(own.model, row), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", REFUSED)
def test_vllm_refuses_by_name(name: str, theirs: dict[str, Any]) -> None:
    case, text = REFUSED[name]
    settings = {"bits": 4, "sym": True} | case.settings
    expected = text.format(bits=settings["bits"], sym=settings["sym"])
    assert expected in theirs[name].get("error", "no error")


def _parts(paths: Iterable[str]) -> set[str]:
    """The layers of the file that vLLM's are made of."""
    names = ((*path.rpartition("."),) for path in paths)
    return {f"{block}{dot}{part}" for block, dot, name in names for part in JOINED.get(name, (name,))}


def _log_probabilities(model: PreTrainedModel, row: list[int]) -> torch.Tensor:
    """Of every token but the first."""
    tokens_T = torch.tensor(row)
    with torch.no_grad():
        logits_TV = model(tokens_T.unsqueeze(0)).logits[0, :-1]
    return logits_TV.log_softmax(-1).gather(-1, tokens_T[1:, None])[:, 0]
