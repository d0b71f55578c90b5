"""Settings: presets, precedence, ranges, and the form of every settings class."""

import dataclasses
import inspect
from importlib import import_module
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoround.errors import UsageError
from autoround.options import settings_of
from autoround.recipe import PRESETS, Recipe
from autoround.spec import QuantSpec

# Everything that holds settings, descriptions or events and no tensor.
MODULES = (
    "autoround.spec", "autoround.layers", "autoround.recipe", "autoround.plan", "autoround.resolve",
    "autoround.progress", "autoround.families", "autoround.formats.gguf.recipes", "autoround.data.language",
    "autoround.data.report", "autoround.formats.auto_gptq", "autoround.formats.auto_round", "autoround.formats.fake",
    "autoround.formats.rules", "autoround.backends.base", "autoround.cli.quantize", "autoround.cli.grammar",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {"iters": 200, "nsamples": 128, "seqlen": 2048, "batch_size": 8, "lr": None}


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("default", {"searches_clips": True, "compensates": False}),
        ("best", {"iters": 1000, "nsamples": 512, "searches_clips": True, "compensates": False}),
        ("light", {"iters": 50, "searches_clips": True, "compensates": False}),
        ("rtn", {"iters": 0, "searches_clips": False, "compensates": False}),
        ("opt_rtn", {"iters": 0, "searches_clips": True, "compensates": True}),
    ],
)
def test_presets(preset: str, settings: dict[str, Any]) -> None:
    recipe = Recipe.preset(preset)
    assert {name: getattr(recipe, name) for name in DEFAULTS | settings} == DEFAULTS | settings
    others = set(settings_of(Recipe)) - set(DEFAULTS) - set(settings) - {"clip_search"}
    assert all(getattr(recipe, name) == getattr(Recipe(), name) for name in others)
    assert recipe.needs_data == (preset != "rtn")


def test_gguf_files_are_searched_even_without_steps() -> None:
    assert Recipe.preset("rtn", format=("gguf:q4_k_m",)).searches_clips
    assert not Recipe.preset("rtn", format=("gguf:q4_k_m",), clip_search=False).searches_clips


def test_there_are_five_presets() -> None:
    assert list(PRESETS) == ["default", "best", "light", "rtn", "opt_rtn"]
    with pytest.raises(UsageError, match="recipe: found 'heavy'; needed one of default, best, light, rtn, opt_rtn"):
        Recipe.preset("heavy")
    with pytest.raises(UsageError, match="recipe: found unknown settings iter, speed; known are activations, adam, "):
        Recipe.preset("light", iter=3, speed=9)


GIVEN = st.fixed_dictionaries({}, optional={
    "iters": st.integers(0, 2000), "nsamples": st.integers(1, 600), "lr": st.floats(1e-6, 1.0), "seed": st.integers(),
    "clip_search": st.booleans(), "compensate": st.booleans(), "keep": st.sampled_from(["last", "best"]),
    "scale_steps": st.integers(0, 9), "bits": st.sampled_from([2, 3, 4, 8]),
})  # fmt: skip


@settings(deadline=None)
@given(st.sampled_from(list(PRESETS)), GIVEN)
def test_what_the_user_gives_wins_and_presets_fill_the_rest(preset: str, settings: dict[str, Any]) -> None:
    recipe = Recipe.preset(preset, **settings)
    assert {name: getattr(recipe, name) for name in settings} == settings
    filled = {name: value for name, value in PRESETS[preset].items() if name not in settings}
    assert {name: getattr(recipe, name) for name in filled} == filled
    assert recipe == Recipe(**PRESETS[preset] | settings)
    steps = recipe.iters > 0 or recipe.scale_steps > 0
    assert recipe.needs_data == (steps or recipe.searches_clips or recipe.compensates)


def test_single_settings_lie_over_the_scheme() -> None:
    assert Recipe().spec == QuantSpec(bits=4, group_size=128, sym=True, scale_dtype="float16")
    assert Recipe(scheme="w3a16g64_asym").spec == QuantSpec(bits=3, group_size=64, sym=False)
    assert Recipe(scheme="W3A16G64_ASYM", sym=True, bits=2).spec == QuantSpec(bits=2, group_size=64)
    assert Recipe(group_size=-1, scale_dtype="bf16").spec == QuantSpec(group_size=-1, scale_dtype="bfloat16")


@pytest.mark.parametrize(
    ("iters", "bits", "rate"),
    [(200, 4, 0.5 / 200), (200, 3, 0.5 / 200), (200, 2, 1 / 200), (999, 2, 1 / 999), (1000, 2, 2 / 1000),
     (1000, 3, 1 / 1000), (1000, 4, 0.5 / 1000), (2000, 3, 1 / 2000), (0, 2, 1.0)],
)  # fmt: skip
def test_learning_rate(iters: int, bits: int, rate: float) -> None:
    assert Recipe(iters=iters).learning_rate(bits) == rate
    assert Recipe(iters=iters, lr=0.25).learning_rate(bits) == 0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iters": -1}, "iters: found -1; needed at least 0"),
        ({"nsamples": 0}, "nsamples: found 0; needed at least 1"),
        ({"seqlen": 0}, "seqlen: found 0; needed at least 1"),
        ({"batch_size": 0}, "batch_size: found 0; needed at least 1"),
        ({"gradient_accumulate_steps": 0}, "gradient_accumulate_steps: found 0; needed at least 1"),
        ({"momentum": 1.0}, "momentum: found 1.0; needed at least 0 and less than 1"),
        ({"momentum": float("nan")}, "momentum: found nan"),
        ({"momentum": 0.9, "adam": True}, "momentum: found 0.9 with adam; needed one of them"),
        ({"lr": 0.0}, "lr: found 0.0; needed a positive number"),
        ({"lr": float("nan")}, "lr: found nan"),
        ({"minmax_lr": float("inf")}, "minmax_lr: found inf"),
        ({"format": ()}, "format: found none; needed at least one"),
        ({"format": "auto_round"}, "format: found the text 'auto_round'; needed a tuple"),
        ({"output_dir": ""}, "output_dir: found ''; needed a folder of its own"),
        ({"output_dir": "."}, "output_dir: found '.'"),
        ({"output_dir": "models/.."}, "output_dir: found 'models/..'"),
        ({"odd_shapes": "guess"}, "odd_shapes: found 'guess'; needed one of fit, keep, fail"),
        ({"keep": "first"}, "keep: found 'first'; needed one of last, best"),
        ({"model_dtype": "int8"}, "model_dtype: found 'int8'; needed one of float16, "),
        ({"scale_dtype": "fp8"}, "scale_dtype: found 'fp8'; needed one of float16, "),
        ({"scheme": "W4A4"}, "scheme: found 'W4A4'; needed W2A16, "),
        ({"bits": 5}, "bits: found 5; needed one of 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size: found 0; needed a positive number"),
        ({"group_size": -2}, "group_size: found -2"),
    ],
)
def test_values_out_of_range_name_the_field(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe(**settings)
    assert str(caught.value).startswith(message)
    assert caught.value.exit_status == 2


def test_recipes_are_values() -> None:
    recipe = Recipe(model_dtype="bf16")
    assert recipe.model_dtype == "bfloat16"
    assert hash(recipe) == hash(Recipe(model_dtype="bfloat16"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.iters = 3  # type: ignore[misc]


def test_every_field_can_be_described_on_a_command_line() -> None:
    for name, (field, option) in settings_of(Recipe).items():
        assert option["help"], name
        assert option["group"], name
        assert field.default is not dataclasses.MISSING, name
        if option["choices"] and field.default is not None:
            assert field.default in option["choices"], name


def settings_classes() -> list[type]:
    """Dataclasses that these modules define."""
    return [
        each
        for module in map(import_module, MODULES)
        for _, each in inspect.getmembers(module, dataclasses.is_dataclass)
        if inspect.isclass(each) and each.__module__ == module.__name__
    ]


def test_the_modules_hold_settings() -> None:
    assert {"QuantSpec", "Recipe", "Plan", "Progress", "Numerics", "DatasetSpec"} <= {
        each.__name__ for each in settings_classes()
    }


@pytest.mark.parametrize("settings", settings_classes(), ids=lambda each: each.__name__)
def test_settings_are_frozen_slotted_and_keyword_only(settings: type) -> None:
    assert settings.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert "__slots__" in vars(settings)
    assert all(field.kw_only for field in dataclasses.fields(settings))
