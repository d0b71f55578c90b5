"""A small model with a tokenizer, as a folder, and quantized folders of it."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from autoround.data.python_docs import python_docs
from tests.formats.quantized import quantized


@pytest.fixture(scope="session")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that knows nothing, with a tokenizer of 400 pieces."""
    folder = tmp_path_factory.mktemp("float")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(python_docs()[:50], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    save_llama(folder, hidden_size=64, intermediate_size=96)
    return folder


def save_llama(folder: Path, *, hidden_size: int, intermediate_size: int) -> None:
    """Write a model of two blocks for that tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def quantized_folder(float_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in 3 bits."""
    return quantized(float_folder, "auto_round", bits=3).write("auto_round", tmp_path_factory.mktemp("q") / "w3")
