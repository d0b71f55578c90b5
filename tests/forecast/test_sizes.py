"""Output sizes, foretold from shapes and compared with files that were written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from autoround.engine import quantize
from autoround.export import Target, weight_files
from autoround.formats.registry import FORMATS
from autoround.formats.rules import RULES
from autoround.formats.writer import INDEX
from autoround.recipe import Recipe
from tests.engine import mixtures, small
from tests.formats import gguf_models
from tests.formats.gguf_tokenizers import sentencepiece

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": small.make,
    "llama_tied": lambda: small.make("llama_tied").to(torch.bfloat16),
    "gpt2": lambda: small.make("gpt2"),
    "qwen3_moe": lambda: mixtures.make("qwen3_moe"),
}
FILE_TYPES = [name for name, rules in RULES.items() if rules.file_type]
WIDE: dict[str, Any] = {"vocab_size": 640, "hidden_size": 256, "intermediate_size": 512}


def foretold_and_written(
    model: PreTrainedModel, made: Recipe, tokenizer: Any = None
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """Sizes of the weight files of each format of a recipe, before its run and after."""
    run = quantize(model, made, tokenizer=tokenizer)
    target = Target(
        folder=Path(made.output_dir), formats=made.format, dtype=made.model_dtype, max_shard_size=made.max_shard_size
    )
    foretold = weight_files(run.model, run.plan, target)
    return foretold, dict(zip(foretold, map(sizes, run.export()), strict=True))


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the weight files in a folder."""
    return {file.name: file.stat().st_size for file in folder.iterdir()
            if file.suffix in (".safetensors", ".gguf") or file.name == INDEX}  # fmt: skip


def rtn(folder: Path, *names: str, **settings: Any) -> Recipe:
    return small.recipe(folder, "rtn", **{"bits": 4, "dataset": None, "format": names, **settings})


@pytest.mark.parametrize("model", MODELS)
def test_every_layout_of_integer_codes(model: str, tmp_path: Path) -> None:
    names = [name for name in FORMATS if not (RULES[name].linear_only and model == "gpt2")]
    foretold, written = foretold_and_written(MODELS[model](), rtn(tmp_path, *names))
    assert foretold == written
    assert len(written) == len(names) > 4


@pytest.mark.parametrize("size", ["30KB", "9KB"])
@pytest.mark.parametrize("settings", [{}, {"model_dtype": "float16"}, {"sym": False, "bits": 3}], ids=str)
def test_shards_and_their_index(settings: dict[str, Any], size: str, tmp_path: Path) -> None:
    made = rtn(tmp_path, "auto_round", max_shard_size=size, quant_lm_head=True, **settings)
    foretold, written = foretold_and_written(small.make("llama_tied"), made)
    assert foretold == written
    assert INDEX in written["auto_round"] and len(written["auto_round"]) > 2


@pytest.mark.parametrize("name", FILE_TYPES)
def test_every_gguf_file_type(name: str, tmp_path: Path) -> None:
    made = rtn(tmp_path, name, bits=None, group_size=None, clip_search=False)
    foretold, written = foretold_and_written(gguf_models.make("llama", **WIDE), made, sentencepiece())
    assert foretold == written
    assert [len(files) for files in written.values()] == [1]
