"""Lifted blocks with recorded calls against the models they come from."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaModel

from autoround import func
from autoround.errors import ModelError
from autoround.model.blocks import find_blocks
from autoround.model.calls import PerSample, Shared
from autoround.model.capture import Captured, capture
from autoround.model.load import OpenModel, open_model
from autoround.model.source import WeightSource
from tests.model import tiny

CPU = {"batch_size": 2, "device": "cpu", "dtype": torch.float32}


def _captured(model: OpenModel, *, padded: bool, **settings: Any) -> Captured:
    return capture(model, tiny.tokens(), tiny.validity(padded=padded), **(CPU | settings))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_lifted_blocks_compute_what_the_model_computes(name: str, padded: bool, tmp_path: Path) -> None:
    original = tiny.save(name, tmp_path)
    model = open_model(tmp_path)
    blocks, valid_NT = find_blocks(model.skeleton), tiny.validity(padded=padded)
    expected = tiny.block_outputs(original, blocks, tiny.tokens(), valid_NT)
    outputs = tiny.chained_outputs(model, blocks, _captured(model, padded=padded), batch_size=2)
    assert len(outputs) == len(expected) == original.config.num_hidden_layers
    for output_NTD, expected_NTD in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output_NTD[valid_NT], expected_NTD[valid_NT], rtol=1e-5, atol=1e-5)


def test_eager_attention_and_bfloat16(tmp_path: Path) -> None:
    original = tiny.save("gemma3", tmp_path).to(torch.bfloat16)
    original.set_attn_implementation("eager")
    model = open_model(tmp_path, attn_implementation="eager")
    captured = _captured(model, padded=True, dtype=torch.bfloat16)
    assert captured.hidden_NTD.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(captured.hidden_NTD, original.get_input_embeddings()(tiny.tokens()))
    mask = captured.templates[0].bind(captured.hidden_NTD[:2], torch.arange(2)).kwargs["attention_mask"]
    assert mask.dtype == torch.bfloat16


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batch_size_changes_no_call(batch_size: int, padded: bool) -> None:
    model = open_model(tiny.make("gemma3"))
    one, other = _captured(model, padded=padded), _captured(model, padded=padded, batch_size=batch_size)
    torch.testing.assert_close(one.hidden_NTD, other.hidden_NTD, rtol=0, atol=0)
    rows_B = torch.tensor([4, 1])
    for a, b in zip(one.templates, other.templates, strict=True):
        torch.testing.assert_close(a.bind(one.hidden_NTD[rows_B], rows_B), b.bind(one.hidden_NTD[rows_B], rows_B))


def test_equal_tensors_are_kept_once() -> None:
    templates = _captured(open_model(tiny.make("gemma3")), padded=True).templates
    sliding, full, again = ([leaf for leaf in each.leaves if isinstance(leaf, PerSample)] for each in templates)
    assert [len(leaf.slices) for leaf in (*sliding, *full)] == [3, 3]  # two padded rows, and all the others
    assert sliding[0] is again[0]
    tables = [{id(leaf) for leaf in each.leaves if isinstance(leaf, Shared)} for each in templates]
    assert tables[0] == tables[2] != tables[1]


def test_calls_without_padding_copy_no_mask() -> None:
    captured = _captured(open_model(tiny.make("gemma3")), padded=False)
    call = captured.templates[0].bind(captured.hidden_NTD, torch.arange(tiny.ROWS))
    assert call.kwargs["attention_mask"].shape == (tiny.ROWS, 1, tiny.TOKENS, tiny.TOKENS)
    assert call.kwargs["attention_mask"].stride(0) == 0
    full = captured.templates[1].bind(captured.hidden_NTD, torch.arange(tiny.ROWS))
    assert full.kwargs["attention_mask"] is None  # lets attention use its causal kernel


@pytest.mark.parametrize(("name", "count"), [("llama", 1), ("gpt2", 1), ("gemma3", 2)])
def test_blocks_of_equal_arithmetic_share_a_signature(name: str, count: int, tmp_path: Path) -> None:
    tiny.save(name, tmp_path)
    skeleton = open_model(tmp_path).skeleton
    signatures = [func.make_block_fn(skeleton.get_submodule(path)).signature for path in find_blocks(skeleton)]
    assert len(signatures) > 1
    assert len(set(signatures)) == count


class _Spy:
    """A source that remembers what was read."""

    def __init__(self, source: WeightSource) -> None:
        self.source, self.names_read = source, list[str]()

    def read(self, name: str) -> Tensor:
        self.names_read.append(name)
        return self.source.read(name)


def test_only_the_embedding_is_read(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    model = open_model(tmp_path)
    spy = _Spy(model.source)
    _captured(dataclasses.replace(model, source=spy), padded=True)
    assert spy.names_read == ["model.embed_tokens.weight"]
    assert all(parameter.is_meta for parameter in model.skeleton.parameters())


class _Curious(LlamaModel):
    """Looks at its blocks and at weights that it does not use."""

    def forward(self, input_ids: Tensor, **ignored: Any) -> None:
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, layer.hidden_size, dtype=self.norm.weight.dtype)


def test_the_model_can_look_at_blocks_and_dtypes() -> None:
    module = LlamaForCausalLM(tiny.CONFIGS["llama"])
    module.model = _Curious(tiny.CONFIGS["llama"])
    captured = _captured(open_model(module), padded=False, dtype=torch.bfloat16)
    call = captured.templates[2].bind(captured.hidden_NTD, torch.arange(tiny.ROWS))
    assert (call.args[1], call.kwargs) == (32, {"dtype": torch.bfloat16})


class _Odd(LlamaModel):
    """Calls its blocks in ways that cannot be recorded."""

    way = ""

    def forward(self, input_ids: Tensor, **ignored: Any) -> None:
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers[::-1] if self.way == "order" else self.layers:
            hidden = layer(hidden, self.extra(hidden, input_ids)) if self.way != "nothing" else layer()

    def extra(self, hidden: Tensor, input_ids: Tensor) -> Any:
        match self.way:
            case "type":
                return {1, 2}
            case "earlier":
                return hidden.mean(-1)
            case "axes":
                return input_ids @ input_ids.mT
            case "count":
                return len(input_ids)
            case "batch":
                return input_ids[-1]


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("order", r"found calls of model\.layers\.2, .*needed model\.layers\.0 … model\.layers\.2 once each"),
        ("nothing", r"model\.layers\.0: found a call without hidden states; needed"),
        ("type", r"model\.layers\.0: found argument \[0\]\[1\] of type set; needed tensors"),
        ("earlier", r"model\.layers\.1: argument \[0\]\[1\]: found a tensor that depends on outputs of other blocks"),
        (
            "axes",
            r"model\.layers\.0: argument \[0\]\[1\]: found shapes \(1, 1\) and \(2, 2\) .*; needed one batch axis",
        ),
        ("count", r"model\.layers\.0: argument \[0\]\[1\]: found 1 and 2; needed the same for all batches"),
        ("batch", r"model\.layers\.0: argument \[0\]\[1\]: found a tensor that differs between batches"),
    ],
)
def test_calls_that_cannot_be_recorded_are_refused(way: str, message: str) -> None:
    module = LlamaForCausalLM(tiny.CONFIGS["llama"])
    module.model = _Odd(tiny.CONFIGS["llama"])
    module.model.way = way
    with pytest.raises(ModelError, match=message):
        _captured(open_model(module), padded=False)
