"""Tiny random models with their plans and their codes, rounded to nearest."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from autoround import func
from autoround.formats.contents import Contents
from autoround.formats.registry import get_format, rules
from autoround.formats.writer import write_checkpoint
from autoround.func import IntCodes, QuantSpec
from autoround.layers import read_layer_config
from autoround.model.experts import describe
from autoround.model.finish import head_path, read_weight
from autoround.model.load import OpenModel, open_model
from autoround.plan import Plan
from autoround.resolve import resolve


def tiny_llama(*, seed: int = 0, intermediate: int = 96, tied: bool = False, bias: bool = False) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=intermediate, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, attention_bias=bias,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(*, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2,
                        bos_token_id=1, eos_token_id=2)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@dataclass(frozen=True)
class Quantized:
    """A model, its plan and its codes."""

    model: OpenModel
    plan: Plan

    @cached_property
    def blocks(self) -> list[dict[str, IntCodes]]:
        return [self._codes(part.prefix, part.specs) for part in self.plan.parts]

    def _codes(self, prefix: str, specs: dict[str, QuantSpec]) -> dict[str, IntCodes]:
        tuned = {name: func.prepare(read_weight(self.model, f"{prefix}{name}"), spec) for name, spec in specs.items()}
        params = func.init_params(tuned)
        return {name: func.quantize(prepared, params[name], specs[name]) for name, prepared in tuned.items()}

    def contents(self, form: str, *, dtype: str | None = None) -> Contents:
        own = get_format(form).suited(self.plan)
        return Contents(model=self.model, plan=self.plan, codes=lambda index: self.blocks[index], form=own, dtype=dtype)

    def write(self, form: str, folder: Path, *, dtype: str | None = None, **options: Any) -> Path:
        write_checkpoint(self.contents(form, dtype=dtype), folder, **options)
        return folder


def quantized(
    model: PreTrainedModel | Path,
    *formats: str,
    odd_shapes: str = "fit",
    head: bool = False,
    layers: Any = (),
    **settings: Any,
) -> Quantized:
    """Open a model and plan it for some formats; the spec is W4 in groups of 32 where settings do not say otherwise.

    Settings of single layers are those of a ``layer_config``.
    """
    opened = open_model(model)
    spec = QuantSpec(**{"group_size": 32, **settings})
    needed = [rules(form) for form in formats or ("auto_round",)]
    shape = replace(describe(opened.skeleton), head=head_path(opened.skeleton))
    own = read_layer_config(layers)
    return Quantized(opened, resolve(spec, odd_shapes, shape, needed, settings=own, head=head))
