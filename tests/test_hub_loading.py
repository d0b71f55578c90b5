"""Loading what was written, by this package and by transformers after ``register``."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from autoround.errors import FormatError, ModelError
from autoround.formats.kernels import find_kernel
from autoround.formats.packed import PackedLinear
from autoround.hub import load, register
from tests.formats.gguf_models import make as make_llama
from tests.formats.gguf_tokenizers import sentencepiece
from tests.formats.quantized import Quantized, quantized, tiny_gpt2, tiny_llama
from tests.formats.test_gguf_file import WIDE, expected, planned

Make = Callable[[], PreTrainedModel]
PROMPT = torch.tensor([[5, 17, 42, 7]])
FORMATS = ("auto_round", "auto_gptq", "fake")
ALL_FORMATS = (
    "auto_round", "auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:gptqmodel", "auto_gptq", "gptq_v2",
    "auto_awq", "llm_compressor",
)  # fmt: skip


def _greedy(model: PreTrainedModel) -> list[int]:
    tokens = model.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    return tokens[0].tolist()


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def _packed(model: PreTrainedModel) -> dict[str, PackedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}


def _half(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with weights that float16 holds exactly, so that every layout keeps them."""
    return model.half().float()


MODELS = {
    "llama": lambda: _half(tiny_llama()),
    "tied_llama_with_biases": lambda: _half(tiny_llama(tied=True, bias=True)),
    "gpt2": lambda: _half(tiny_gpt2()),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("bits", "sym"), [(2, True), (3, True), (4, True), (4, False), (8, False)])
def test_every_layout_generates_the_same(make: Make, bits: int, sym: bool, tmp_path: Path) -> None:
    tiny = quantized(make(), *FORMATS, bits=bits, sym=sym)
    models = {form: load(tiny.write(form, tmp_path / form), dtype="float32") for form in FORMATS}
    assert set(_packed(models["auto_round"])) == set(_packed(models["auto_gptq"])) == set(tiny.plan.specs)
    assert not _packed(models["fake"])
    expected = _logits(models["fake"])
    assert not torch.equal(expected, _logits(make()))  # quantization changed something
    for form in ("auto_round", "auto_gptq"):
        torch.testing.assert_close(_logits(models[form]), expected, rtol=0, atol=1e-5)
        assert _greedy(models[form]) == _greedy(models["fake"])


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_four_bits_in_every_layout(sym: bool, group_size: int, tmp_path: Path) -> None:
    tiny = quantized(_half(tiny_llama(bias=True)), *ALL_FORMATS, sym=sym, group_size=group_size)
    expected = _logits(load(tiny.write("fake", tmp_path / "fake"), dtype="float32"))
    for form in ALL_FORMATS:
        model = load(tiny.write(form, tmp_path / form.replace(":", "_")), dtype="float32")
        assert set(_packed(model)) == set(tiny.plan.specs), form
        torch.testing.assert_close(_logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bits", "sym"), [(2, True), (2, False), (8, True), (8, False)])
def test_llm_compressor_in_other_widths(bits: int, sym: bool, tmp_path: Path) -> None:
    """Rows of 96 and of 64 in groups of 64 and 32, so that the config has two groups."""
    tiny = quantized(tiny_llama(), "llm_compressor", group_size=64, bits=bits, sym=sym)
    assert len(set(tiny.plan.specs.values())) == 2
    model = load(tiny.write("llm_compressor", tmp_path / "out"), dtype="float32")
    assert set(_packed(model)) == set(tiny.plan.specs)
    expected = _logits(load(tiny.write("fake", tmp_path / "fake"), dtype="float32"))
    torch.testing.assert_close(_logits(model), expected, rtol=0, atol=1e-5)


def test_kept_and_odd_layers(tmp_path: Path) -> None:
    """Rows of 80 take groups of 16 in auto_round, and are no multiple of 32, so that they are kept."""
    tiny = quantized(tiny_llama(intermediate=80), "auto_round", "auto_gptq")
    assert {path.rpartition(".")[2] for path in tiny.plan.specs} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for form in ("auto_round", "auto_gptq"):
        assert set(_packed(load(tiny.write(form, tmp_path / form)))) == set(tiny.plan.specs)
    mixed = quantized(tiny_llama(), "auto_round", group_size=64)
    assert {spec.group_size for spec in mixed.plan.specs.values()} == {64, 32}
    packed = load(mixed.write("auto_round", tmp_path / "mixed"), dtype="float32")
    torch.testing.assert_close(_logits(packed), _logits(load(mixed.write("fake", tmp_path / "dense"))))


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_dtypes(scale_dtype: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    """Scales stay as they are whatever the activations are."""
    tiny = quantized(tiny_llama(bias=True), scale_dtype=scale_dtype)
    model = load(tiny.write("auto_round", tmp_path / "out"), dtype=dtype)
    layer = _packed(model)["model.layers.0.self_attn.q_proj"]
    assert layer.scales.dtype == getattr(torch, scale_dtype)
    assert layer.bias is not None
    assert layer.bias.dtype == model.dtype == _logits(model).dtype == (dtype or torch.float32)


@pytest.mark.parametrize("sym", [True, False])
def test_bfloat16_is_as_near_as_a_dense_model(sym: bool, tmp_path: Path) -> None:
    """Without gradients, the kernel multiplies; its logits differ from float32 as those of dense bfloat16 do."""
    tiny = quantized(_half(tiny_llama(bias=True)), "auto_round", "fake", sym=sym)
    folders = {form: tiny.write(form, tmp_path / form) for form in ("auto_round", "fake")}
    exact = _logits(load(folders["fake"], dtype="float32"))
    packed = load(folders["auto_round"], dtype="bfloat16")
    held = [path for path, layer in _packed(packed).items() if layer.tiles is not None]
    assert "model.layers.0.self_attn.q_proj" in held or find_kernel(torch.device("cpu")) is None
    dense, ours = (
        float((_logits(model).float() - exact).norm()) for model in (load(folders["fake"], dtype="bfloat16"), packed)
    )
    assert ours < 2 * dense


@pytest.fixture(scope="module")
def llama() -> Quantized:
    return quantized(tiny_llama(), "auto_round", "auto_gptq")


def test_register_serves_from_pretrained_and_is_undone(llama: Quantized, tmp_path: Path) -> None:
    folder = llama.write("auto_round", tmp_path / "out")
    before = [dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)]
    registration = register()
    assert AUTO_QUANTIZER_MAPPING["gptq"] is before[0]["gptq"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert _greedy(model) == _greedy(load(folder))
    registration.undo()
    assert before == [AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING]
    registration.undo()
    assert before == [AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING]
    with pytest.raises(ImportError, match="auto-round"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_register_for_gptq(llama: Quantized, tmp_path: Path) -> None:
    folder = llama.write("auto_gptq", tmp_path / "out")
    with register(("gptq",)):
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert _packed(model)
    with pytest.raises(ImportError, match="optimum"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_load_leaves_no_trace(llama: Quantized, tmp_path: Path) -> None:
    before = [dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)]
    folder = llama.write("auto_round", tmp_path / "out")
    load(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(ModelError, match=r"out/model.safetensors: found a damaged or truncated file"):
        load(folder)
    assert before == [AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING]


@pytest.mark.parametrize("form", ["auto_round", "auto_gptq"])
def test_a_loaded_model_saves_as_it_was(form: str, llama: Quantized, tmp_path: Path) -> None:
    folder = llama.write(form, tmp_path / "out")
    load(folder).save_pretrained(tmp_path / "again")
    first, second = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("form", ["auto_awq", "llm_compressor"])
def test_a_model_that_was_repacked_is_not_saved(form: str, llama: Quantized, tmp_path: Path) -> None:
    """Its tensors are no longer those that its quantization config tells of."""
    tiny = quantized(tiny_llama(), form)
    with pytest.raises(ValueError, match="not serializable"):
        load(tiny.write(form, tmp_path / "out")).save_pretrained(tmp_path / "again")


def test_a_foreign_file_with_reordered_columns(llama: Quantized, tmp_path: Path) -> None:
    """g_idx is followed where it is not in order: columns of one layer and its g_idx permuted alike."""
    folder = llama.write("auto_gptq", tmp_path / "out")
    path = "model.layers.0.mlp.down_proj"
    weight = _packed(load(folder))[path].dequantize()
    tensors = load_file(folder / "model.safetensors")
    order = torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(0))
    tiny = llama.blocks[0]["mlp.down_proj"]
    packed = llama.contents("auto_gptq").form.pack(tiny._replace(q_OI=tiny.q_OI[:, order]), llama.plan.specs[path])
    tensors[f"{path}.qweight"] = packed["qweight"]
    tensors[f"{path}.g_idx"] = tensors[f"{path}.g_idx"][order]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(_packed(load(folder))[path].dequantize(), weight[order])


def _edit_config(folder: Path, **changes: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_layouts_of_other_tools_are_refused(llama: Quantized, tmp_path: Path) -> None:
    folder = llama.write("auto_round", tmp_path / "out")
    _edit_config(folder, packing_format="auto_round:fp8")
    with pytest.raises(FormatError, match="out: found packing_format 'auto_round:fp8'; needed one of"):
        load(folder)


def test_gptq_version_2_stores_true_zero_points(llama: Quantized, tmp_path: Path) -> None:
    folder = llama.write("auto_gptq", tmp_path / "out")
    _edit_config(folder, checkpoint_format="gptq_v2")
    assert {layer.zero_offset for layer in _packed(load(folder)).values()} == {0}


def test_gguf_files_are_dequantized(tmp_path: Path) -> None:
    file = planned(make_llama("llama", **WIDE), "q4_k_m", sentencepiece())
    file.write(tmp_path / "a.gguf")
    wanted = expected(file)
    for path, dtype in ((tmp_path, torch.float32), (tmp_path / "a.gguf", torch.bfloat16)):
        found = load(path, dtype=None if dtype == torch.float32 else dtype).state_dict()
        assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in wanted.items())
    file.write(tmp_path / "b.gguf")
    with pytest.raises(ModelError, match="found 2 GGUF files; needed one; name the file, such as .*a.gguf"):
        load(tmp_path)
    (tmp_path / "c.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:-100])
    with pytest.raises(FormatError, match="c.gguf: found no complete GGUF file"):
        load(tmp_path / "c.gguf")


def test_damaged_folders(llama: Quantized, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="found no config.json"):
        load(tmp_path)
    with pytest.raises(ModelError, match="absent: .*; needed a complete checkpoint folder or a hub name"):
        load(tmp_path / "absent")
    folder = llama.write("auto_round", tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    path = "model.layers.0.mlp.down_proj"
    scales = tensors.pop(f"{path}.scales")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=f"{path}: found qweight without scales"):
        load(folder)
    tensors |= {f"{path}.scales": scales, f"{path}.qweight": tensors[f"{path}.qweight"][4:].clone()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=rf"{path}: found qweight of shape \(8, 64\) with 3 groups a row; needed 96 "):
        load(folder)
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match="found no packed layers"):
        load(folder)
