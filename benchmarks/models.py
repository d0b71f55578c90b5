"""Models that benchmarks quantize, by name; each is made from what is installed, in seconds or minutes.

``smollm2-dithered`` and ``small-llama`` are whole models. ``smollm2-blocks-N`` are the first N blocks of the former and
``llama-width-N`` one random block of N columns, N a multiple of 192, for figures of time alone.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import small_llama, smollm2

MODELS: dict[str, Callable[[Path], None]] = {
    "small-llama": small_llama.save_trained,
    "smollm2-dithered": smollm2.save_dithered,
}
_PART = re.compile(r"(smollm2-blocks|llama-width)-(\d+)")


def once(file: Path, make: Callable[[Path], object]) -> Path:
    """A file or folder that ``make`` writes, unless an earlier call of the benchmark finished it."""
    if not file.exists():
        unfinished = file.with_name(f"unfinished-{file.name}")
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        file.parent.mkdir(parents=True, exist_ok=True)
        make(unfinished)
        unfinished.rename(file)
    return file


def source(name: str, folder: Path) -> Path:
    """The folder of a model in ``folder``, made if it is not there.

    Raises:
        ValueError: no model of that name.
    """
    if name in MODELS:
        return once(folder / name, MODELS[name])
    found = _PART.fullmatch(name)
    if found is None:
        raise ValueError(f"found model {name!r}; needed {', '.join(MODELS)}, smollm2-blocks-N or llama-width-N")
    family, size = found.group(1), int(found.group(2))
    if family == "smollm2-blocks":
        whole = source("smollm2-dithered", folder)
        return once(folder / name, lambda to: save_blocks(whole, to, size))
    return once(folder / name, lambda to: save_width(to, size))


def save_blocks(whole: Path, folder: Path, blocks: int) -> None:
    """Write a model with its first blocks alone."""
    model = AutoModelForCausalLM.from_pretrained(whole, num_hidden_layers=blocks, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    smollm2.load_tokenizer().save_pretrained(folder)


def save_width(folder: Path, width: int) -> None:
    """Write a random Llama of one block in SmolLM2's proportions: heads of 64, a third of them for keys and values."""
    tokenizer = smollm2.load_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
