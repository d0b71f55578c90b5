"""Words that are Intel's alone: their meaning, their notes, their refusals."""

from pathlib import Path
from typing import Any

import pytest

from autoround.cli.quantize import grammar
from autoround.cli.refused import FLAGS
from autoround.errors import UsageError
from autoround.intel.adopt import adopt, take, takes_value
from autoround.intel.words import DEPENDENT, FALSE, REFUSED, SCHEMES, SYNONYMS, TAKEN
from autoround.plan import BlockShape, LayerShape, Structure
from autoround.recipe import PRESETS, Recipe
from autoround.resolve import resolve

GOLDEN = Path(__file__).parent / "golden" / "auto_round_0_16_flags.txt"


def test_a_name_has_one_fate() -> None:
    tables: list[set[str]] = [
        set(TAKEN),
        set(DEPENDENT),
        set(SYNONYMS),
        set(REFUSED),
        set(grammar("default").spellings()),
    ]
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))


def test_every_flag_of_theirs_has_a_fate() -> None:
    theirs = {flag.removeprefix("--").replace("-", "_") for flag in GOLDEN.read_text().split()}
    assert theirs <= {*FLAGS, *grammar("default").spellings()}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_makes_a_recipe(name: str) -> None:
    value: object = TAKEN[name].values[0] if takes_value(name) else True
    assert isinstance(Recipe.preset("default", **adopt({}, {name: value}).settings), Recipe)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        adopt({}, {name: True})
    assert str(caught.value) == f"--{name}: {REFUSED[name]}"


def test_other_spellings_and_opposites_lead_somewhere() -> None:
    assert {*SYNONYMS.values(), *FALSE.values(), *FALSE} <= {*TAKEN, *DEPENDENT, *REFUSED}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_out_of_scope_is_refused_by_name_in_any_case(scheme: str) -> None:
    with pytest.raises(UsageError, match=f"^scheme: found {scheme.lower()}; {SCHEMES[scheme][:20]}"):
        adopt({"scheme": scheme.lower()}, {})


@pytest.mark.parametrize(
    ("words", "preset", "settings", "notes"),
    [
        ("--iters 0 --disable_opt_rtn", "default", {"iters": 0, "clip_search": False}, 0),
        ("--disable-opt-rtn", "opt_rtn", {"clip_search": False}, 0),
        ("--disable_opt_rtn", "default", {}, 1),
        ("--alg rtn", "default", {"iters": 0}, 0),
        ("--algorithm=auto_round", "default", {}, 0),
        ("--nblocks 1 --data_type int --act_bits 16", "best", {}, 0),
        ("--model_free", "best", {"iters": 0, "clip_search": False}, 0),
        ("--enable_alg_ext --low_cpu_mem_usage", "default", {"clip_search": True}, 2),
        ("--scheme gguf:Q4_K_M", "default", {"format": ("gguf:q4_k_m",)}, 0),
        ("--scheme GGUF:Q4_K_S --format gguf:q4_k_s,fake", "rtn", {"format": ("gguf:q4_k_s", "fake")}, 0),
        ("--to_quant_block_names layers.1", "default", {"ignore_layers": (r"^(?!.*(?:layers.1(?!\d)))",)}, 0),
    ],
)
def test_meanings(words: str, preset: str, settings: dict[str, Any], notes: int) -> None:
    found = _adopted(words, preset)
    assert found.settings == settings
    assert len(found.notes) == notes
    assert preset in PRESETS and Recipe.preset(preset, **found.settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--nblocks 2", "--nblocks: found 2; needed 1: blocks are tuned one at a time; leave it out"),
        ("--nblocks", "--nblocks: expected one argument"),
        ("--platform model_scope", "--platform: found model_scope; needed hf: models come from the Hugging Face hub"),
        ("--algorithm auto_round,awq", "--algorithm: found awq; needed auto_round or rtn"),
        ("--model_free --iters 7", "--model_free: found iters 7 beside it; needed 0; leave one out"),
        ("--not_use_best_mse --keep best", "--not_use_best_mse: found keep best beside it; needed last; leave one out"),
        ("--scheme GGUF:Q4_K_M --format auto_round", "scheme: found GGUF:Q4_K_M with --format auto_round; needed"),
        ("--scheme GGUF:Q9", "format: found 'GGUF:Q9'; needed one of auto_round"),
        ("--schemes W4A16,W8A16", "scheme: found W4A16,W8A16; needed one; several are not available yet"),
        ("--format mlx", "format: found mlx; MLX is out of scope"),
        ("--to_quant_block_names layers.0 --quant_lm_head", "--to_quant_block_names: found --quant_lm_head beside it"),
        ("--to_quant_block_names [", r"--to_quant_block_names: found '\[', no regular expression"),
        ("--to_quant_block_names ,", "--to_quant_block_names: found no name; needed such as"),
    ],
)
def test_refusals(words: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        _adopted(words)


def test_only_the_named_blocks_are_quantized() -> None:
    blocks = [
        BlockShape(
            path=f"model.layers.{index}",
            layers=(LayerShape(path=f"model.layers.{index}.up", out_features=64, in_features=128),),
        )
        for index in (0, 1, 11)
    ]
    head = LayerShape(path="lm_head", out_features=64, in_features=128)
    structure = Structure(architecture="Tiny", blocks=tuple(blocks), outside=(head,), head="lm_head")

    def quantized(names: str) -> list[str]:
        recipe = Recipe(**_adopted(f"--to_quant_block_names {names}").settings)
        return list(resolve(recipe.spec, "fit", structure, [], settings=recipe.layer_settings).specs)

    assert quantized("model.layers.1") == ["model.layers.1.up"]
    assert quantized("layers.0,layers.11") == ["model.layers.0.up", "model.layers.11.up"]
    assert quantized("model.layers") == [block.layers[0].path for block in blocks]


def _adopted(words: str, preset: str = "default") -> Any:
    kept, theirs = take(words.split())
    return adopt(grammar(preset).read(kept), theirs, preset)
