"""What the output head is called with, and the weights of layers outside the blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from autoround.errors import ModelError
from autoround.model.blocks import find_blocks
from autoround.model.finish import Ending, head_path, mean_square, read_weight
from autoround.model.load import open_model
from tests.model.tiny import block_outputs, make, save, tokens, validity


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3", "gpt2", "bloom"])
def test_the_head_gets_what_it_gets_in_the_whole_model(name: str, padded: bool, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    opened, tokens_NT, valid_NT = open_model(tmp_path), tokens(), validity(padded=padded)
    blocks, head, seen = find_blocks(opened.skeleton), head_path(opened.skeleton), []
    assert head == "lm_head"

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    model.get_submodule(head).register_forward_pre_hook(note)
    last_NTD = block_outputs(model, blocks, tokens_NT, valid_NT)[-1]
    ending = Ending(opened, blocks, head, torch.device("cpu"), torch.float32)
    pairs = list(ending.head_inputs(last_NTD, tokens_NT, valid_NT, batch_size=2))
    assert [len(x_BTD) for x_BTD, _ in pairs] == [2, 2, 1]
    torch.testing.assert_close(torch.cat([x_BTD for x_BTD, _ in pairs]), seen[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([valid_BT for _, valid_BT in pairs]), valid_NT)
    torch.testing.assert_close(mean_square(pairs), seen[0][valid_NT].square().mean(0), rtol=1e-4, atol=1e-6)


def test_weights_are_read_as_outputs_by_inputs(tmp_path: Path) -> None:
    model = save("gpt2", tmp_path)
    opened = open_model(tmp_path)
    layer: Any = model.get_submodule("transformer.h.0.mlp.c_fc")
    assert torch.equal(read_weight(opened, "transformer.h.0.mlp.c_fc"), layer.weight.t())
    assert torch.equal(read_weight(opened, "lm_head"), model.get_parameter("transformer.wte.weight"))
    assert torch.equal(read_weight(opened, "transformer.wte"), model.get_parameter("transformer.wte.weight"))


def test_models_without_a_head_or_with_one_that_is_not_called() -> None:
    opened = open_model(make("llama"))

    class Headless(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.model(*args, **kwargs)

    config: LlamaConfig = opened.config  # type: ignore[assignment]
    skeleton = open_model(Headless(config)).skeleton
    skeleton.set_output_embeddings(nn.Identity())  # type: ignore[no-untyped-call]
    assert head_path(skeleton) == ""
    blocks = find_blocks(opened.skeleton)
    ending = Ending(open_model(Headless(config)), blocks, "lm_head", torch.device("cpu"), torch.float32)
    hidden_NTD = torch.zeros(*tokens().shape, config.hidden_size)
    with pytest.raises(ModelError, match="needed model.layers.0 … lm_head once each in this order"):
        list(ending.head_inputs(hidden_NTD, tokens(), validity(padded=False), batch_size=2))
