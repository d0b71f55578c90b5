"""What transformers keeps in float32 stays so: while blocks are tuned and judged, and in the files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from autoround.backends.cpu import CPU
from autoround.coverage import coverage
from autoround.engine import quantize
from autoround.journal import Journal
from autoround.model.load import open_model
from autoround.model.read import read_block
from autoround.passes import gram_of
from autoround.precision import held_dtypes
from tests.engine import mixtures, small
from tests.engine.small import ROWS, TOKENS, recipe

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def one_sided() -> PreTrainedModel:
    """Biases send all tokens to experts 1 and 3; in bfloat16, or float16 for the last two, they are alike."""
    model = mixtures.make("deepseek_v3")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.gate").weight.mul_(1e-3)
        model.get_buffer(BIAS).copy_(torch.tensor([8.0, 8.02, 8.001, 8.021]))
    return model


def test_transformers_tells_what_it_keeps() -> None:
    model = one_sided()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        dtypes = held_dtypes(model, dtype)
        assert dtypes(BIAS) == dtypes("mlp.gate.e_score_correction_bias") == torch.float32
        assert dtypes("model.layers.1.mlp.gate.weight") == dtype
    assert held_dtypes(small.make(), torch.bfloat16)("model.layers.0.input_layernorm.weight") == torch.bfloat16


@pytest.mark.parametrize("iters", [0, 2])
def test_routers_choose_as_the_model_does(iters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(CPU), "compute_dtype", lambda self: torch.bfloat16)
    own = recipe(tmp_path, bits=4, iters=iters, clip_search=True, torch_compile=False, format=("fake",))
    run = quantize(one_sided(), own)
    list(run)
    assert run.numerics.torch_dtype is torch.bfloat16
    counts = coverage(Journal(run.journal_folder, {}).read_stats(1))["mlp.experts"]
    assert counts == (0, ROWS * TOKENS, 0, ROWS * TOKENS)


def test_blocks_are_read_and_written_with_them(tmp_path: Path) -> None:
    model = one_sided()
    tensors = read_block(open_model(model), "model.layers.1", dtype=torch.bfloat16)
    assert torch.equal(tensors["mlp.gate.e_score_correction_bias"], model.get_buffer(BIAS))
    assert tensors["mlp.gate.weight"].dtype == torch.bfloat16
    (folder,) = quantize(model, recipe(tmp_path, "rtn", bits=4, format=("auto_gptq",))).export()
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(stored[BIAS], model.get_buffer(BIAS))
    assert stored["model.layers.1.mlp.gate.weight"].dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hessians_are_as_precise_as_float32(dtype: torch.dtype) -> None:
    x_MI = torch.randn(512, 320, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    wanted_II = x_MI.double().T @ x_MI.double()
    found_II = torch.zeros(320, 320)
    gram_of(dtype)(found_II, x_MI)
    assert (found_II - wanted_II).triu().abs().max() < 1e-5 * wanted_II.max()


def test_the_precision_of_other_products_is_left_alone() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(IndexError):
        gram_of(torch.bfloat16)(torch.ones(2, 2), torch.ones(2))
    assert torch.get_float32_matmul_precision() == before
