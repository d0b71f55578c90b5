"""What only a GPU can show: runs on it work, continue, and agree with the processor. Skipped where there is none."""

from pathlib import Path

import pytest
import torch

from autoround import func, load
from autoround.backends.gpu import GpuBackend
from autoround.engine import quantize
from tests.engine.small import codes, divergence, equal_share, hashes, make, recipe, replaced, stopped, tune

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch.cuda sees")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_codes_give_back_what_was_tuned_with(bits: int, sym: bool) -> None:
    spec = func.QuantSpec(bits=bits, group_size=32, sym=sym)
    generator = torch.Generator("cuda").manual_seed(bits)
    prepared = func.prepare(torch.randn(96, 128, device="cuda", generator=generator), spec)
    params = func.init_params({"up": prepared})["up"]
    noise_OGS = torch.rand(params.offset_OGS.shape, device="cuda", generator=generator) - 0.5
    params = params._replace(offset_OGS=noise_OGS, clip_max_OG=params.clip_max_OG * 0.9)
    rounded_OI = func.dequantize(func.quantize(prepared, params, spec), spec)
    assert torch.equal(rounded_OI, func.fake_quantize(prepared, params, spec))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("preset", ["default", "opt_rtn", "rtn"])
def test_in_float32_it_agrees_with_the_processor(name: str, preset: str, tmp_path: Path) -> None:
    one = tune(make(name), tmp_path / "cpu", preset, dtype="float32")
    other = tune(make(name), tmp_path / "cuda", preset, dtype="float32", device_map="cuda")
    assert other.device.type == "cuda"
    assert equal_share(codes(one), codes(other)) > (0.999 if preset == "rtn" else 0.97)


@pytest.mark.parametrize("compiled", [False, True])
def test_steps_help(compiled: bool, tmp_path: Path) -> None:
    settings = {"device_map": "cuda", "bits": 2, "torch_compile": compiled}
    nearest = tune(make(), tmp_path / "rtn", "rtn", device_map="cuda", bits=2)
    tuned = tune(make(), tmp_path / "tuned", iters=60, clip_search=True, **settings)
    assert (tuned.numerics.compiler is not None) == compiled
    model = make()
    found = [divergence(replaced("llama", run), model) for run in (tuned, nearest)]
    assert found[0] < 0.8 * found[1]


def test_a_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole = recipe(tmp_path / "whole", device_map="cuda")
    run = quantize(make("llama_3"), whole)
    (folder,) = run.export()
    parts = recipe(tmp_path / "parts", device_map="cuda")
    stopped(make("llama_3"), parts, after=1)
    (again,) = quantize(make("llama_3"), parts).export()
    assert hashes(folder) == hashes(again)


def test_scales_of_all_blocks(tmp_path: Path) -> None:
    model = make()
    plain, tuned = (tune(model, tmp_path / str(steps), device_map="cuda", scale_steps=steps) for steps in (0, 48))
    assert divergence(replaced("llama", tuned), model) < 0.85 * divergence(replaced("llama", plain), model)


@pytest.mark.parametrize("settings", [{"low_gpu_mem_usage": True}, {"gradient_accumulate_steps": 2, "batch_size": 2}])
def test_other_ways_to_the_same_steps(settings: dict[str, int], tmp_path: Path) -> None:
    plain = tune(make(), tmp_path / "plain", dtype="float32", device_map="cuda", batch_size=4)
    other = tune(make(), tmp_path / "other", dtype="float32", device_map="cuda", **{"batch_size": 4} | settings)
    assert equal_share(codes(plain), codes(other)) > 0.97


def test_a_written_model_computes_on_the_gpu(tmp_path: Path) -> None:
    made = recipe(tmp_path, device_map="cuda", bits=4)
    run = quantize(make(), made)
    (folder,) = run.export()
    model = load(folder, dtype="float32")
    expected = divergence(replaced("llama", run), make())
    assert divergence(model, make()) == pytest.approx(expected, rel=1e-3)
    tokens_BT = torch.arange(3, 19).view(1, -1)
    with torch.no_grad():
        on_cpu = model(input_ids=tokens_BT).logits
        on_gpu = model.cuda()(input_ids=tokens_BT.cuda()).logits.cpu()
    assert torch.allclose(on_cpu, on_gpu, atol=1e-2, rtol=1e-2)


SEVERAL = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")


@SEVERAL
def test_several_gpus_share_the_rows(tmp_path: Path) -> None:
    """As one GPU that computes the same micro-batches; equal GPUs give equal bits."""
    settings = {"dtype": "float32", "torch_compile": False}
    one = tune(make(), tmp_path / "one", device_map="0", batch_size=2, gradient_accumulate_steps=2, **settings)
    two = tune(make(), tmp_path / "two", device_map="0,1", batch_size=4, **settings)
    assert equal_share(codes(one), codes(two)) > 0.97
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert equal_share(codes(one), codes(two)) == 1


@SEVERAL
@pytest.mark.parametrize("preset", ["default", "opt_rtn"])
def test_modules_of_a_block_on_several_gpus(preset: str, tmp_path: Path) -> None:
    settings = {"dtype": "float32", "torch_compile": False}
    one = tune(make(), tmp_path / "one", preset, device_map="0", **settings)
    two = tune(make(), tmp_path / "two", preset, device_map="{self_attn: 1, up_proj: 1}", **settings)
    assert equal_share(codes(one), codes(two)) > 0.97


@SEVERAL
def test_a_block_that_one_gpu_has_no_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tune(make(), tmp_path / "one", dtype="float32", device_map="0", batch_size=2, gradient_accumulate_steps=2)
    monkeypatch.setattr(GpuBackend, "device_bytes", lambda self, device: 10**6)
    two = tune(make(), tmp_path / "two", dtype="float32", device_map="0,1", batch_size=4)
    assert equal_share(codes(one), codes(two)) > 0.97
