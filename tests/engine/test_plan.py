"""The fate of every weight."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoround.errors import UsageError
from autoround.formats.rules import RULES
from autoround.plan import FormatRules, Plan, check_format
from autoround.resolve import FITTING_GROUP_SIZES, resolve
from autoround.spec import QuantSpec
from tests.engine.plans import FREE, ROWS, RULE_SETS, SPECS, UNIFORM, structure


def groups(plan: Plan) -> dict[str, int]:
    """Layer of the first block -> its group size; kept ones are missing."""
    return {path: spec.group_size for path, spec in plan.blocks[0].specs.items()}


def test_what_fits_is_quantized_and_the_rest_of_the_model_is_left_alone() -> None:
    plan = resolve(QuantSpec(group_size=64), "fit", structure(128, 192), [RULES["auto_round"]])
    assert plan.spec == QuantSpec(group_size=64)
    assert [block.path for block in plan.blocks] == ["model.layers.0", "model.layers.1"]
    assert list(plan.blocks[1].specs) == ["0", "1"]
    assert set(plan.specs.values()) == {plan.spec}
    assert list(plan.layers)[-1] == "lm_head"
    assert plan.layers["lm_head"].reason == "outside the blocks, tied to model.embed"
    assert "lm_head" not in plan.specs
    assert plan.notes == ()


@pytest.mark.parametrize(
    ("row", "asked", "size"),
    [(576, 128, 64), (576, 64, 64), (96, 128, 32), (80, 128, 16), (1536, 1024, 512), (3072, 4096, 1024), (576, -1, -1)],
)
def test_fit_takes_the_largest_size_that_divides_the_row(row: int, asked: int, size: int) -> None:
    assert groups(resolve(QuantSpec(group_size=asked), "fit", structure(row), [FREE])) == {"0": size}


def test_auto_round_fits_every_layer_by_itself() -> None:
    plan = resolve(QuantSpec(), "fit", structure(576, 1536, 96), [RULES["auto_round"]])
    assert groups(plan) == {"0": 64, "1": 128, "2": 32}
    assert plan.spec.group_size == 128
    assert plan.notes == ("4 layers take a smaller group size than 128, which does not divide their rows",)


@pytest.mark.parametrize("formats", [["auto_gptq"], ["auto_round", "auto_gptq"], ["fake", "auto_gptq", "auto_round"]])
def test_gptq_needs_one_size_for_the_whole_model(formats: list[str]) -> None:
    plan = resolve(QuantSpec(), "fit", structure(576, 1536, 96), [RULES[name] for name in formats])
    assert groups(plan) == {"0": 32, "1": 32, "2": 32}
    assert plan.spec.group_size == 32
    assert plan.notes == ("group size 32 for the whole model: 128 does not divide rows of 96",)


def test_a_size_that_no_loader_runs_is_replaced() -> None:
    plan = resolve(QuantSpec(group_size=96), "fit", structure(192), [RULES["auto_gptq"]])
    assert groups(plan) == {"0": 64}
    assert plan.notes == ("group size 64 for the whole model: auto_gptq does not take 96",)
    assert groups(resolve(QuantSpec(group_size=96), "fit", structure(192), [RULES["auto_round"]])) == {"0": 96}
    for odd_shapes, asked in (("keep", 96), ("fail", 96), ("fit", 8)):
        with pytest.raises(UsageError, match=f"format auto_gptq: found group_size {asked}; needed one of -1, 16, 32"):
            resolve(QuantSpec(group_size=asked), odd_shapes, structure(192), [RULES["auto_gptq"]])


@pytest.mark.parametrize("rules", [FREE, UNIFORM])
def test_keep_leaves_odd_layers_as_they_are(rules: FormatRules) -> None:
    plan = resolve(QuantSpec(), "keep", structure(576, 256), [rules])
    assert groups(plan) == {"1": 128}
    assert plan.layers["model.layers.1.0"].reason == "group_size 128 does not divide in_features 576"
    assert plan.notes == (
        "model.layers.0.0 is kept: group_size 128 does not divide in_features 576",
        "model.layers.1.0 is kept: group_size 128 does not divide in_features 576",
    )


@pytest.mark.parametrize("rules", [FREE, UNIFORM])
def test_fail_names_the_layer_and_what_would_fit(rules: FormatRules) -> None:
    needed = "model.layers.0.1: in_features 576 is not a multiple of group_size 128; use 32 or 64"
    with pytest.raises(UsageError, match=needed):
        resolve(QuantSpec(), "fail", structure(256, 576), [rules])
    assert resolve(QuantSpec(), "fail", structure(256, 512), [rules]).notes == ()


@pytest.mark.parametrize("name", ["auto_round", "auto_gptq"])
def test_shapes_that_no_loader_takes_are_kept(name: str) -> None:
    """They neither fail nor shrink the group size of the others."""
    for odd_shapes in ("fit", "keep", "fail"):
        plan = resolve(QuantSpec(), odd_shapes, structure(128, 72), [RULES[name]])
        assert groups(plan) == {"0": 128}
        assert plan.layers["model.layers.0.1"].reason == "64x72 is not a multiple of 32"
    plan = resolve(QuantSpec(), "fit", structure(128, 72), [RULES["fake"]])
    assert groups(plan) == {"0": 128}  # no size of ours divides 72
    assert groups(resolve(QuantSpec(group_size=24), "fit", structure(128, 72), [RULES["fake"]])) == {"0": 16, "1": 24}


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"plan: found no layer to quantize \(64x72 is not a multiple of 32\); use"):
        resolve(QuantSpec(), "fit", structure(72), [RULES["auto_round"]])
    with pytest.raises(UsageError, match="found no layer to quantize .*group_size 128 does not divide in_features 576"):
        resolve(QuantSpec(), "keep", structure(576), [FREE])
    with pytest.raises(UsageError, match="found no layer to quantize"):
        resolve(QuantSpec(), "fit", structure(100, out_features=33), [RULES["auto_gptq"]])


def test_the_smallest_zero_point_is_planned_from_the_formats() -> None:
    def zero_min(*formats: str) -> int:
        return resolve(QuantSpec(sym=False), "fit", structure(128), [RULES[name] for name in formats]).spec.zero_min

    assert zero_min("auto_round") == zero_min("fake") == zero_min("auto_round", "fake") == zero_min() == 0
    assert zero_min("auto_gptq") == zero_min("auto_round", "auto_gptq", "fake") == 1
    plan = resolve(QuantSpec(sym=False), "fit", structure(576, 128), [RULES["auto_gptq"]])
    assert {spec.zero_min for spec in plan.specs.values()} == {1}
    plan = resolve(QuantSpec(), "fit", structure(576, 128), [RULES["auto_gptq"]])  # symmetric ones are in the middle
    assert {plan.spec.zero_min, *(spec.zero_min for spec in plan.specs.values())} == {0}


def test_bits_and_scale_dtypes_outside_a_format_are_refused() -> None:
    narrow = FormatRules(name="narrow", bits=(4, 8))
    with pytest.raises(UsageError, match="format narrow: found bits 3; needed one of 4, 8"):
        resolve(QuantSpec(bits=3), "fit", structure(128), [FREE, narrow])
    with pytest.raises(UsageError, match="format auto_gptq: found scale_dtype bfloat16; needed float16"):
        resolve(QuantSpec(scale_dtype="bf16"), "fit", structure(128), [RULES["auto_gptq"]])
    assert resolve(QuantSpec(scale_dtype="bf16"), "fit", structure(128), [RULES["auto_round"]]).specs


def test_formats_that_come_later_are_checked_against_the_plan() -> None:
    mixed = resolve(QuantSpec(), "fit", structure(576, 128), [RULES["auto_round"]])
    for name in ("auto_round", "fake"):
        check_format(mixed, RULES[name])
    refusals = {
        "needed 128 as elsewhere": (mixed, UNIFORM),
        "found group_size 64; needed one of 128": (mixed, FormatRules(name="one", group_sizes=(128,))),
        "64x576 is not a multiple of 256": (mixed, FormatRules(name="wide", multiple=256)),
        "found bits 4; needed one of 8": (mixed, FormatRules(name="eight", bits=(8,))),
        "found scale_dtype float32; needed float16": (
            resolve(QuantSpec(scale_dtype="fp32"), "fit", structure(128), [FREE]),
            RULES["auto_gptq"],
        ),
    }
    for text, (plan, rules) in refusals.items():
        with pytest.raises(UsageError, match=text):
            check_format(plan, rules)


@settings(deadline=None)
@given(SPECS, ROWS, RULE_SETS, st.sampled_from(["fit", "keep", "fail"]))
def test_every_plan_can_be_carried_out(spec: QuantSpec, rows: list[int], rules: list[FormatRules], odd: str) -> None:
    """Groups divide their rows, every format holds the plan, and kept layers say why."""
    try:
        plan = resolve(spec, odd, structure(*rows), rules)
    except UsageError:
        return
    for path, own in plan.specs.items():
        row = plan.layers[path].shape.in_features
        assert row % own.group_of(row) == 0
        assert replace(own, group_size=spec.group_size, zero_min=0) == replace(spec, zero_min=0)
    for rule in rules:
        check_format(plan, rule)
    for layer in plan.layers.values():
        assert (layer.spec is None) == bool(layer.reason)
    if odd != "fit":
        assert {own.group_size for own in plan.specs.values()} == {spec.group_size}


@settings(deadline=None)
@given(st.integers(16, 300), ROWS)
def test_one_size_for_the_whole_model_is_the_largest_common_one(asked: int, rows: list[int]) -> None:
    plan, common = resolve(QuantSpec(group_size=asked), "fit", structure(*rows), [UNIFORM]), math.gcd(*rows)
    fitting = [size for size in FITTING_GROUP_SIZES if size < asked and common % size == 0]
    assert plan.spec.group_size == (asked if common % asked == 0 else fitting[0])
    assert set(groups(plan).values()) == {plan.spec.group_size}
