"""Scores block by block against those of models in memory."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from autoround.engine import quantize
from autoround.errors import DataError, ModelError
from autoround.evaluate.opening import open_checkpoint
from autoround.evaluate.scores import TokenScores, compare
from autoround.evaluate.stream import Rows, Streamed, Streaming, compare_streamed
from autoround.hub import load
from autoround.model.load import open_model
from autoround.progress import Progress
from autoround.ranks import Alone
from autoround.recipe import Recipe
from tests.families.table import make as make_family
from tests.formats.quantized import quantized, tiny_gpt2, tiny_llama
from tests.model.tiny import CONFIGS, VOCABULARY, make

STREAMING = Streaming(batch_size=3)
T = TypeVar("T")


def rows(vocabulary: int, *, count: int = 5, tokens: int = 12) -> Rows:
    tokens_NT = torch.randint(0, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(1))
    return Rows(tokens_NT, torch.ones_like(tokens_NT, dtype=torch.bool))


def assert_same(found: TokenScores, expected: TokenScores) -> None:
    torch.testing.assert_close(found.nll_P, expected.nll_P, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.kl_P, expected.kl_P, rtol=0, atol=1e-5)
    assert found.top1 == pytest.approx(expected.top1, abs=0.02)  # of equal logits either may come first


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_models_in_memory(name: str) -> None:
    """Tied heads, windows, biases, blocks that return tuples."""
    model, other = make(name), make(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    text = rows(VOCABULARY)
    expected = compare(model, {"other": other}, text.tokens_NT)
    found = compare_streamed(open_model(model), {"other": open_model(other)}, text, streaming=STREAMING)
    assert list(found) == ["float", "other"]
    assert found["other"].scores.kl > 1e-2
    for key, scores in expected.items():
        assert_same(found[key].scores, scores)


@pytest.mark.parametrize("form", ["auto_round", "auto_gptq", "auto_awq", "llm_compressor", "fake"])
def test_equals_what_a_quantized_folder_loads_to(form: str, tmp_path: Path) -> None:
    model = tiny_llama(tied=True, bias=True)
    folder = quantized(model, form, sym=False).write(form, tmp_path / form)
    text = rows(128)
    expected = compare(model, {"quantized": load(folder, dtype="float32")}, text.tokens_NT)
    found = compare_streamed(open_model(model), {"quantized": open_checkpoint(folder)}, text, streaming=STREAMING)
    assert_same(found["quantized"].scores, expected["quantized"])
    assert expected["quantized"].kl > 1e-3


def test_conv1d_and_a_quantized_head(tmp_path: Path) -> None:
    for make_model, head in ((tiny_gpt2, False), (lambda: tiny_llama(tied=True), True)):
        model = make_model()
        folder = quantized(model, "auto_round", bits=3, head=head).write("auto_round", tmp_path / str(head))
        text = rows(128)
        expected = compare(model, {"quantized": load(folder, dtype="float32")}, text.tokens_NT)
        found = compare_streamed(open_model(model), {"quantized": open_checkpoint(folder)}, text, streaming=STREAMING)
        assert_same(found["quantized"].scores, expected["quantized"])


def test_a_single_block_that_returns_a_tuple() -> None:
    model, text = make("bloom", n_layer=1), rows(VOCABULARY)
    found = compare_streamed(open_model(model), {}, text, streaming=STREAMING)
    assert_same(found["float"].scores, compare(model, {}, text.tokens_NT)["float"])


def test_padding_is_neither_seen_nor_scored() -> None:
    model, text = make("llama"), rows(VOCABULARY)
    text.valid_NT[1, 7:] = False
    found = compare_streamed(open_model(model), {}, text, streaming=STREAMING)["float"]
    whole = compare(model, {}, text.tokens_NT)["float"].nll_P.view(5, 11)
    expected = torch.cat([whole[0], whole[1, :6], whole[2:].flatten()])
    torch.testing.assert_close(found.scores.nll_P, expected, rtol=0, atol=1e-5)


def test_blocks_are_told_and_top_tokens_are_the_models() -> None:
    model, text, told = make("llama"), rows(VOCABULARY), list[Progress]()
    found = compare_streamed(open_model(model), {}, text, streaming=STREAMING, on_progress=told.append)["float"]
    assert [(moment.block, moment.blocks, moment.step, moment.steps) for moment in told] == [
        (1, 3, 0, 0), (2, 3, 0, 0), (3, 3, 0, 0), (0, 0, 0, 55), (0, 0, 55, 55),
    ]  # fmt: skip
    assert told[0].eta_seconds is None
    assert all(moment.eta_seconds is not None and moment.eta_seconds > 0 for moment in told[1:4])
    assert told[4].eta_seconds == 0
    with torch.no_grad():
        expected = model(text.tokens_NT).logits[:, :-1].argmax(-1).flatten()
    assert torch.equal(found.top_P, expected)


class Teller(Alone):
    """One of several ranks that take turns: it knows what those before it told."""

    def __init__(self, rank: int, size: int, told: list[Any]) -> None:
        self.rank, self.size, self._told = rank, size, told  # type: ignore[misc]

    def gather(self, value: T) -> list[T]:
        self._told.append(value)
        return list(self._told)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_score_rows_of_their_own(size: int) -> None:
    model, other, text = open_model(make("llama")), open_model(make("gpt2")), rows(VOCABULARY)
    whole = compare_streamed(model, {"other": other}, text, streaming=STREAMING)
    told: list[dict[str, Streamed]] = []
    for rank in range(size):  # the last one knows what all have
        own = dataclasses.replace(STREAMING, ranks=Teller(rank, size, told))
        found = compare_streamed(model, {"other": other}, text, streaming=own)
    assert [len(part["other"].top_P) if part else 0 for part in told] == [3 * 11, 2 * 11, 0][:size]
    for name, scored in whole.items():
        assert_same(found[name].scores, scored.scores)
        assert torch.equal(found[name].top_P, scored.top_P)


def test_other_vocabularies_and_rows_of_one_token() -> None:
    one, other = open_model(make("llama")), open_model(make("llama", vocab_size=VOCABULARY + 1))
    with pytest.raises(ModelError, match="found a vocabulary of 49 tokens; needed the 48 of LlamaForCausalLM"):
        compare_streamed(one, {"other": other}, rows(VOCABULARY), streaming=STREAMING)
    with pytest.raises(DataError, match="found rows of 1 tokens"):
        compare_streamed(one, {}, rows(VOCABULARY, tokens=1), streaming=STREAMING)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_quantized_mixture_of_experts(family: str, tmp_path: Path) -> None:
    """Its float codes as a folder of their own are the measure: loaded experts may be multiplied in another order."""
    model = make_family(family)
    model.save_pretrained(tmp_path / "float")
    recipe = Recipe.preset("rtn", format=("auto_round", "fake"), output_dir=str(tmp_path / "out"))
    run = quantize(tmp_path / "float", recipe)
    list(run)
    packed, plain = run.export()
    text = rows(model.config.vocab_size)
    candidates = {"packed": open_checkpoint(packed), "plain": open_checkpoint(plain)}
    found = compare_streamed(open_model(tmp_path / "float"), candidates, text, streaming=STREAMING)
    assert_same(found["packed"].scores, found["plain"].scores)
    assert found["plain"].scores.kl > 1e-4
