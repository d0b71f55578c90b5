"""What blocks hand to later ones, and what they return beside hidden states."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, LlamaForCausalLM, LlamaModel
from transformers.cache_utils import KVSharingDict

from autoround import func
from autoround.errors import ModelError
from autoround.model.blocks import find_blocks
from autoround.model.capture import capture
from autoround.model.carry import attach, strip
from autoround.model.load import open_model
from autoround.model.record import RecordingModel
from tests.model import tiny

_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def gemma4() -> Gemma4ForCausalLM:
    config = Gemma4TextConfig(
        vocab_size=tiny.VOCABULARY,
        vocab_size_per_layer_input=tiny.VOCABULARY,
        hidden_size=32,
        hidden_size_per_layer_input=16,
        intermediate_size=48,
        num_hidden_layers=len(_LAYERS),
        layer_types=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_kv_shared_layers=2,
        head_dim=16,
        global_head_dim=32,
        sliding_window=4,
    )
    torch.manual_seed(0)
    return Gemma4ForCausalLM._from_config(config, dtype=torch.float32).eval()


def test_shared_keys_and_values_travel_beside_the_hidden_states() -> None:
    original = gemma4()
    model, valid_NT = open_model(original), tiny.validity(padded=True)
    blocks = find_blocks(model.skeleton)
    captured = capture(model, tiny.tokens(), valid_NT, batch_size=2)
    outputs = tiny.chained_outputs(model, blocks, captured, batch_size=3)
    sliding, full = 2 * 2 * 16, 2 * 2 * 32  # keys and values of two heads
    assert [output.shape[-1] - 32 for output in outputs] == [sliding, sliding + full, sliding + full, sliding + full]
    expected = tiny.block_outputs(original, blocks, tiny.tokens(), valid_NT)
    for path, output_NTW, expected_NTD in zip(blocks, outputs, expected, strict=True):
        output_NTD = strip(model.skeleton.get_submodule(path), output_NTW)
        torch.testing.assert_close(output_NTD[valid_NT], expected_NTD[valid_NT], rtol=1e-5, atol=1e-5)


def test_blocks_that_carry_other_things_share_no_step() -> None:
    model = open_model(gemma4())
    blocks = find_blocks(model.skeleton)
    capture(model, tiny.tokens(), tiny.validity(padded=False), batch_size=5)
    one, two = (model.skeleton.get_submodule(path) for path in blocks[:2])
    before = func.make_block_fn(two).signature
    vars(two)["carried"] = vars(one)["carried"]
    assert func.make_block_fn(two).signature != before


def test_the_model_itself_computes_what_it_did() -> None:
    model, (first, *_) = gemma4(), tiny.tokens().split(1)
    blocks = find_blocks(model)
    with torch.no_grad():
        expected = model(input_ids=tiny.tokens()).logits
        recording = RecordingModel(open_model(model), blocks, torch.device("cpu"), torch.float32)
        attach(model, recording(first, None, shift=0.0))
        attach(model, recording(first, None, shift=0.0))  # a second time changes nothing
        torch.testing.assert_close(model(input_ids=tiny.tokens()).logits, expected)


class _Odd(LlamaModel):
    """Its blocks return three items and are given a mapping; some change what flows between blocks."""

    way = ""

    def forward(self, input_ids: Tensor, **ignored: Any) -> None:
        hidden, shared = self.embed_tokens(input_ids), KVSharingDict()
        for layer in self.layers:
            hidden, _, _ = layer(hidden, shared=shared) if self.way == "mapping" else layer(hidden)
            hidden = hidden * 2 if self.way == "scale" else hidden


def _odd(way: str) -> LlamaForCausalLM:
    module = LlamaForCausalLM(tiny.CONFIGS["llama"])
    module.model = _Odd(tiny.CONFIGS["llama"])
    module.model.way = way
    return module


def _captured(module: LlamaForCausalLM) -> Any:
    return capture(open_model(module), tiny.tokens(), tiny.validity(padded=False), batch_size=2)


def test_models_may_unpack_what_blocks_return() -> None:
    captured = _captured(_odd(""))
    assert len(captured.templates) == 3
    assert captured.hidden_NTD.shape == (tiny.ROWS, tiny.TOKENS, 32)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("scale", r"model\.layers\.1: found hidden states that the model changes after model\.layers\.0; needed"),
        ("mapping", r"model\.layers\.0: found a block that cannot be run without data .*; needed that to follow"),
    ],
)
def test_what_cannot_be_followed_is_refused(way: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        _captured(_odd(way))
