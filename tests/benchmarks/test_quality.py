"""The judge: its sums equal those of the package's own comparison, its intervals what statistics say."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import autoround
from autoround.evaluate import compare
from autoround.formats.packed import PackedLinear
from benchmarks import quality
from benchmarks.quality import ALL, FLOAT, DocumentScores


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def scores_of(values: torch.Tensor, tokens: int = 10) -> DocumentScores:
    """Documents of equal length whose KL per token is given."""
    return DocumentScores(torch.full_like(values, tokens), *([values * tokens] * 3))


def test_sums_of_documents_of_all_lengths_equal_the_comparison_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "BATCH_TOKENS", 80)
    monkeypatch.setattr(quality, "CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(50, (length,), generator=generator).tolist() for length in (9, 30, 2, 17, 30, 5)]
    reference, other = llama(0), llama(1)
    found = quality.judge(reference, {"other": other}, documents)
    for index, row in enumerate(documents):
        expected = compare(reference, {"other": other}, torch.tensor([row]), reference_name=FLOAT)
        for name, own in found.items():
            assert own.tokens_D[index] == len(row) - 1
            for sums_D, per_token_P in zip(own[1:], expected[name], strict=True):
                assert float(sums_D[index]) == pytest.approx(float(per_token_P.double().sum()), rel=1e-4, abs=1e-5)


def test_a_model_beside_itself_differs_by_nothing() -> None:
    values = {"text": scores_of(torch.rand(40, dtype=torch.float64))}
    own = quality.estimate({"first": values, "again": values})["again"]["text"]["kl"]
    assert (own.difference, own.low, own.high) == (0, 0, 0)
    assert own.error > 0


def test_errors_are_those_of_a_mean_and_differences_are_paired() -> None:
    generator = torch.Generator().manual_seed(0)
    kl_D = torch.rand(400, generator=generator, dtype=torch.float64)
    noise_D = 0.01 * torch.randn(400, generator=generator, dtype=torch.float64)
    found = quality.estimate({"first": {"text": scores_of(kl_D)}, "second": {"text": scores_of(kl_D + 0.1 + noise_D)}})
    own = found["second"]["text"]["kl"]
    assert own.value == pytest.approx(float((kl_D + 0.1 + noise_D).mean()))
    assert own.error == pytest.approx(float(kl_D.std() / 20), rel=0.1)
    assert own.low < 0.1 < own.high
    assert own.high - own.low == pytest.approx(2 * 1.96 * 0.01 / 20, rel=0.2)


def test_tokens_count_alike_over_all_domains() -> None:
    short, long = scores_of(torch.full((5,), 1.0).double(), tokens=10), scores_of(torch.full((5,), 2.0).double(), 30)
    own = quality.estimate({"model": {"a": short, "b": long}})["model"]
    assert own[ALL]["kl"].value == pytest.approx((1 * 50 + 2 * 150) / 200)
    assert own["a"]["kl"].error == pytest.approx(0, abs=1e-12)


def test_dense_layers_compute_what_packed_ones_do(quantized_folder: Path) -> None:
    tokens_BT = torch.arange(3, 15)[None]
    packed, made = (autoround.load(quantized_folder, dtype="float32") for _ in range(2))
    made = quality.dense(made)
    assert not any(isinstance(module, PackedLinear) for module in made.modules())
    torch.testing.assert_close(made(tokens_BT).logits, packed(tokens_BT).logits, rtol=1e-5, atol=1e-5)


def test_command_scores_packed_and_float_checkpoints(
    float_folder: Path,
    quantized_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "quality.json"
    arguments = ["--reference", str(float_folder), str(float_folder), str(quantized_folder), "--tokens", "2000",
                 "--dtype", "float32", "--json", str(file)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["quality", *arguments])
    quality.run()
    found = json.loads(file.read_text())
    own, packed = (found["estimates"][str(folder)] for folder in (float_folder, quantized_folder))
    assert set(own) == {"docs", "code", "prose", "model", ALL}
    assert own[ALL]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert own[ALL]["top1"]["value"] == 1
    for estimates in packed.values():
        assert estimates["kl"]["low"] > 0.01
        assert estimates["kl"]["difference"] == pytest.approx(estimates["kl"]["value"], abs=1e-6)
    sums = found["documents"][str(quantized_folder)]
    tokens = sum(sum(each["tokens_D"]) for each in sums.values())
    assert tokens >= 2000
    assert packed[ALL]["kl"]["value"] == pytest.approx(sum(sum(each["kl_D"]) for each in sums.values()) / tokens)
    assert "beside" in capsys.readouterr().out
