"""Tiny random models, recipes for them, and what a run leaves behind."""

import hashlib
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from autoround import func
from autoround.engine import Run, quantize
from autoround.journal import Journal, read_manifest, write_manifest
from autoround.progress import BlockDone
from autoround.recipe import Recipe

VOCABULARY, ROWS, TOKENS = 96, 16, 16

_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
_MODERN: dict[str, Any] = _IDS | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_MODERN, tie_word_embeddings=False),
    "llama_tied": LlamaConfig(**_MODERN, tie_word_embeddings=True),
    "llama_3": LlamaConfig(**_MODERN | {"num_hidden_layers": 3}, tie_word_embeddings=False),
    "gpt2": GPT2Config(**_IDS, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    # Two functions: sliding and full attention alternate.
    "gemma3": Gemma3TextConfig(
        **_MODERN | {"num_hidden_layers": 3},
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


def make(name: str = "llama", *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A model with random weights."""
    config = CONFIGS[name].from_dict(CONFIGS[name].to_dict() | settings)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model


def rows(*, seed: int = 1, count: int = ROWS, length: int = TOKENS) -> list[list[int]]:
    """Token ids."""
    ids: list[list[int]] = torch.randint(
        3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return ids


def recipe(folder: Path, preset: str = "default", **settings: Any) -> Recipe:
    """A recipe of six steps at 2 bits, without clip search, that writes to ``folder / "out"``."""
    own: dict[str, Any] = {
        "bits": 2,
        "group_size": 32,
        "dataset": rows(),
        "nsamples": ROWS,
        "seqlen": TOKENS,
        "batch_size": 4,
        "output_dir": str(folder / "out"),
        "device_map": "cpu",
    }
    if preset == "default":
        own |= {"iters": 6, "clip_search": False}
    return Recipe.preset(preset, **own | settings)


def stopped(model: PreTrainedModel | Path, made: Recipe, *, after: int) -> list[BlockDone]:
    """Start a run and give up after some blocks."""
    return list(islice(quantize(model, made), after))


def pin(model: PreTrainedModel | Path, made: Recipe, **numerics: Any) -> Recipe:
    """Let a journal begin that records other numerics than the backend would choose; the recipe, to go on with."""
    stopped(model, made, after=1)
    journal = Path(f"{made.output_dir}.journal")
    manifest = read_manifest(journal)
    assert set(numerics) <= set(manifest["numerics"])
    manifest["numerics"] |= numerics
    write_manifest(journal, manifest)
    for name in ("blocks", "activations"):
        shutil.rmtree(journal / name)
    return made


def tune(
    model: PreTrainedModel | Path, folder: Path, preset: str = "default", *, dtype: str | None = None, **settings: Any
) -> Run:
    """A run of which all blocks are done and nothing is exported; ``dtype`` replaces the backend's choice."""
    made = recipe(folder, preset, **settings)
    run = quantize(model, pin(model, made, dtype=dtype) if dtype else made)
    assert len(list(run)) == len(run.plan.parts)
    return run


def codes(run: Run) -> dict[str, func.IntCodes]:
    """The codes that a run has journaled, by layer path in the plan's order."""
    journal = Journal(run.journal_folder, {})
    found = {
        f"{block.prefix}{relative}": own
        for index, block in enumerate(run.plan.parts)
        for relative, own in journal.read_block(index).items()
    }
    assert set(found) == set(run.plan.specs)
    return {path: found[path] for path in run.plan.specs}


def equal_share(one: dict[str, func.IntCodes], two: dict[str, func.IntCodes]) -> float:
    """Share of weights that have the same code."""
    assert list(one) == list(two)
    same = [(one[path].q_OI == two[path].q_OI).flatten() for path in one]
    return float(torch.cat(same).float().mean())


def nearest(model: PreTrainedModel, run: Run) -> dict[str, func.IntCodes]:
    """Every layer of a run's plan rounded to nearest, without the engine."""
    found = {}
    for path, spec in run.plan.specs.items():
        layer = model.get_submodule(path)
        weight_OI = layer.weight if isinstance(layer, torch.nn.Linear) else layer.weight.t()
        prepared = func.prepare(weight_OI.detach(), spec)
        found[path] = func.quantize(prepared, func.init_params({path: prepared})[path], spec)
    return found


def replaced(name: str, run: Run, *, kept: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The model ``make(name)`` with the dequantized codes of a run as weights; the rest is cast to a dtype."""
    model, specs = make(name, seed=seed), run.plan.specs
    if "lm_head" in specs and model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(kept))
        for path, own in codes(run).items():
            layer, weight_OI = model.get_submodule(path), func.dequantize(own, specs[path])
            layer.weight.copy_(weight_OI if isinstance(layer, torch.nn.Linear) else weight_OI.t())
    return model


def logits(model: PreTrainedModel) -> Tensor:
    """Logits for the calibration rows, float32."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(rows())).logits.float()


def divergence(model: PreTrainedModel, reference: PreTrainedModel) -> float:
    """KL divergence from the reference, mean over tokens, in nats."""
    theirs, ours = (logits(each).log_softmax(-1) for each in (reference, model))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
