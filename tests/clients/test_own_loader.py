"""``autoround.load`` and transformers' reader of GGUF files find the weights that codes stand for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from autoround import func
from autoround.formats.gguf.recipes import FILE_TYPES
from autoround.hub import load
from tests.clients.cases import ASYM, BITS, BOTH, MIXED, MIXED_3, MIXED_SYM, SYM, Case, llama_with_zero_points_of_0
from tests.formats import gguf_models
from tests.formats import test_gguf_architectures as transformers_gguf
from tests.formats.gguf_tokenizers import sentencepiece
from tests.formats.quantized import Quantized, quantized, tiny_gpt2, tiny_llama
from tests.formats.test_gguf_file import WIDE, expected, planned

pytestmark = pytest.mark.clients

# Loader and environment -> who that is.
CLIENTS = {("load", "own"): "autoround.load, transformers 5.23"}
FILE_CLIENTS: dict[str, Callable[[Path], PreTrainedModel]] = {
    CLIENTS["load", "own"]: partial(load, dtype="float32"),
    "transformers 5.23 with gguf 0.19": transformers_gguf.load,
}
TOKENS = torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(1))
_HALF = {"f16": torch.float16, "bf16": torch.bfloat16}
_CELLS = {
    **dict.fromkeys(("auto_round:auto_gptq", "auto_round:gptqmodel", "auto_gptq", "gptq_v2", "fake"), SYM + ASYM),
    **dict.fromkeys(("auto_round:auto_awq", "auto_awq"), ((4, True), (4, False))),
    "auto_round": SYM + ASYM,
    "llm_compressor": tuple((bits, sym) for bits in BITS if bits != 3 for sym in BOTH),
}


def _case(form: str, **settings: object) -> Case:
    exact = form.startswith(("auto_gptq", "auto_round:auto_gptq")) or settings.get("sym", True)
    return Case("load", form, tiny_llama if exact else llama_with_zero_points_of_0, settings, "", "own")


CASES: dict[str, Case] = {
    **{
        f"own-{form}-{'sym' if sym else 'asym'}-{bits}": _case(form, bits=bits, sym=sym)
        for form, cells in _CELLS.items()
        for bits, sym in cells
    },
    **{f"own-{form}-mixed-bits": _case(form, layers=MIXED_3) for form in ("auto_round", "auto_gptq", "fake")},
    **{f"own-{form}-asym-mixed-bits": _case(form, sym=False, layers=MIXED_SYM) for form in ("auto_round", "gptq_v2")},
    "own-llm_compressor-mixed-bits": _case("llm_compressor", layers=MIXED),
    "own-auto_awq-kept-layers": _case("auto_awq", layers={"layers.0.mlp.down_proj": "keep"}),
    "own-auto_round-tied-conv1d-quantized-head": Case("load", "auto_round", tiny_gpt2, {"head": True}, "", "own"),
}


def dequantized(model: PreTrainedModel, own: Quantized) -> PreTrainedModel:
    """The model, its parameters rounded to float16, with the weights that the codes stand for."""
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    for part, codes in zip(own.plan.parts, own.blocks, strict=True):
        for name, spec in part.specs.items():
            layer, weight_OI = model.get_submodule(f"{part.prefix}{name}"), func.dequantize(codes[name], spec)
            layer.weight = nn.Parameter(weight_OI.t() if isinstance(layer, Conv1D) else weight_OI)
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_loader_computes_what_codes_stand_for(name: str, tmp_path: Path) -> None:
    """Weights that are kept are float16 in some layouts; all are here, so that nothing is rounded."""
    case = CASES[name]
    own = quantized(case.make().half(), case.form, **case.settings)
    read = load(own.write(case.form, tmp_path, dtype="float32" if case.form == "fake" else None), dtype="float32")
    with torch.no_grad():
        wanted_BTV = dequantized(case.make(), own)(TOKENS).logits
        torch.testing.assert_close(read(TOKENS).logits, wanted_BTV, rtol=0, atol=1e-4)


@dataclass(frozen=True)
class GgufFolder:
    """A written file and the tensors that it stands for."""

    path: Path
    tensors: dict[str, Tensor]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GgufFolder]:
    root, found = tmp_path_factory.mktemp("gguf"), {}
    for name in FILE_TYPES:
        file, path = planned(gguf_models.make("llama", **WIDE), name, sentencepiece()), root / f"{name}.gguf"
        file.write(path)
        half = _HALF.get(name, torch.float32)
        tensors = {key: wanted.to(half if wanted.ndim == 2 else wanted.dtype) for key, wanted in expected(file).items()}
        found[name] = GgufFolder(path, {key: wanted.float() for key, wanted in tensors.items()})
    return found


@pytest.mark.parametrize("client", FILE_CLIENTS)
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_the_reader_finds_what_codes_stand_for(file_type: str, client: str, files: dict[str, GgufFolder]) -> None:
    read = FILE_CLIENTS[client](files[file_type].path).state_dict()
    for name, wanted in files[file_type].tensors.items():
        assert torch.equal(read[name], wanted), name
