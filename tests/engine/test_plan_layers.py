"""The fate of single layers that have settings of their own, and of the output head."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoround.errors import UsageError
from autoround.formats.rules import RULES
from autoround.layers import read_ignored, read_layer_config
from autoround.plan import BlockShape, FormatRules, LayerShape, Plan, Structure, check_format
from autoround.resolve import resolve
from autoround.spec import BITS, QuantSpec
from tests.engine.plans import FREE, ROWS, RULE_SETS, SPECS, structure

LLAMA = Structure(
    architecture="Llama",
    blocks=tuple(
        BlockShape(
            path=f"model.layers.{block}",
            layers=tuple(
                LayerShape(path=f"model.layers.{block}.{name}", out_features=128, in_features=row)
                for name, row in {
                    "self_attn.q_proj": 128, "self_attn.k_proj": 128, "self_attn.v_proj": 128,
                    "mlp.gate_proj": 128, "mlp.up_proj": 128, "mlp.down_proj": 192,
                }.items()
            ),
        )
        for block in range(2)
    ),
    outside=(
        LayerShape(path="project_in", out_features=128, in_features=64),
        LayerShape(path="lm_head", out_features=256, in_features=128, tied_to="model.embed_tokens"),
    ),
    head="lm_head",
)  # fmt: skip


def planned(config: object, *formats: str, head: bool = False, ignored: str = "", **spec: Any) -> Plan:
    settings = (*read_layer_config(config), *read_ignored(ignored))
    rules = [RULES[name] for name in formats or ("auto_round",)]
    return resolve(QuantSpec(**{"group_size": 64, **spec}), "fit", LLAMA, rules, settings=settings, head=head)


def test_settings_lie_over_those_of_the_model() -> None:
    plan = planned(
        {"down_proj": {"bits": 8}, "layers.1.mlp": {"sym": False, "group_size": 32}}, "auto_round", "gptq_v2"
    )
    specs, base = plan.specs, QuantSpec(group_size=64)
    assert plan.spec == base == specs["model.layers.0.mlp.up_proj"] == specs["model.layers.1.self_attn.q_proj"]
    assert specs["model.layers.0.mlp.down_proj"] == replace(base, bits=8)
    assert specs["model.layers.1.mlp.down_proj"] == replace(base, bits=8, sym=False, group_size=32)
    assert specs["model.layers.1.mlp.up_proj"] == replace(base, sym=False, group_size=32)
    mixed = planned({"down": {"bits": 8, "sym": False}}, "auto_gptq").specs.values()
    assert {(spec.sym, spec.zero_min) for spec in mixed} == {(True, 0), (False, 1)}


def test_what_is_kept_because_it_was_asked_for_says_so_and_is_no_news() -> None:
    plan = planned({"model.layers.0.mlp.up_proj": "keep"}, ignored="down_proj,lm_head")
    reasons = {path: layer.reason for path, layer in plan.layers.items() if layer.spec is None}
    assert reasons == {
        "model.layers.0.mlp.up_proj": "asked for by layer_config model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj": "asked for by ignore_layers down_proj",
        "model.layers.1.mlp.down_proj": "asked for by ignore_layers down_proj",
        "project_in": "outside the blocks",
        "lm_head": "outside the blocks, tied to model.embed_tokens",
    }
    assert not any("is kept" in note for note in plan.notes)
    with pytest.raises(UsageError, match=r"found no layer to quantize \(asked for by ignore_layers layers\)"):
        planned({}, ignored="layers")


def test_group_sizes_of_single_layers() -> None:
    """They are fitted like those of the model, and leave the one size that GPTQ needs alone."""
    plan = planned({"down_proj": {"group_size": 128}, "gate_proj": {"group_size": 96}}, "auto_gptq", group_size=128)
    assert plan.spec.group_size == 128
    assert plan.specs["model.layers.0.mlp.down_proj"].group_size == 64  # of 192 columns
    assert plan.specs["model.layers.0.mlp.gate_proj"].group_size == 64  # 96 is no size of GPTQ's
    assert "4 layers take a smaller group size than 96 or 128, which does not divide their rows" in plan.notes
    assert planned({}, "auto_gptq", group_size=128).spec.group_size == 64
    config = read_layer_config({"down_proj": {"group_size": 128}})
    for odd, message in (("fail", "model.layers.0.mlp.down_proj: in_features 192 is not a multiple"), ("keep", "")):
        try:
            plan = resolve(QuantSpec(group_size=64), odd, LLAMA, [FREE], settings=config)
        except UsageError as error:
            assert message and message in str(error)
        else:
            assert plan.layers["model.layers.0.mlp.down_proj"].spec is None
    with pytest.raises(
        UsageError, match="format auto_gptq: model.layers.0.mlp.up_proj: found group_size 8; needed one"
    ):
        planned({"up_proj": {"group_size": 8}}, "auto_gptq")


def test_formats_that_hold_no_mixture_name_the_layer_and_those_that_do() -> None:
    where = "format auto_awq: model.layers.0.mlp.down_proj: found"
    others = "as elsewhere; use auto_round, auto_gptq, gptq_v2, llm_compressor or fake"
    for config, found in (({"bits": 8}, "bits 8; needed 4"), ({"group_size": 32}, "group_size 32; needed 64")):
        with pytest.raises(UsageError, match=f"^{where} {found} {others}$"):
            planned({"down_proj": config}, "auto_round", "auto_awq")
    assert planned({"down_proj": {"sym": False}}, "auto_awq").specs  # zero points are stored for all
    with pytest.raises(
        UsageError, match="format llm_compressor: model.layers.1.mlp.gate_proj: found bits 3; needed one of 2"
    ):
        planned({"layers.1.mlp": {"bits": 3}}, "llm_compressor")
    with pytest.raises(UsageError, match="format auto_gptq: .*q_proj: found scale_dtype float32; needed float16"):
        planned({"q_proj": {"scale_dtype": "fp32"}}, "auto_gptq")


def test_layers_that_servers_fuse_must_agree_or_the_plan_says_so() -> None:
    note = "vLLM and SGLang run them as one layer and refuse packed formats of this model"
    assert planned({"(q|k|v)_proj": {"bits": 8}, "down_proj": {"bits": 2}, "layers.1.mlp": "keep"}).notes == ()
    assert planned({"k_proj": {"bits": 8}, "model.layers.1.mlp.up_proj": "keep"}).notes == (
        f"q_proj, k_proj and v_proj differ in model.layers.0.self_attn and 1 more: {note}",
        f"gate_proj and up_proj differ in model.layers.1.mlp: {note}",
    )


# The output head


def test_the_head_is_quantized_when_asked_for() -> None:
    base = QuantSpec(group_size=64)
    for plan in (planned({}, head=True), planned({"lm_head": {"bits": 4}}), planned({"^lm_.*": "W4A16G64"})):
        assert plan.specs["lm_head"] == base
        assert plan.notes == ("lm_head is untied from model.embed_tokens, which stays unquantized",)
        assert [part.path for part in plan.parts] == ["model.layers.0", "model.layers.1", ""]
        assert plan.parts[-1].specs == {"lm_head": base}
        assert plan.parts[-1].title == "lm_head"
        assert plan.layers["project_in"].spec is None
    assert planned({".*": {"bits": 8}}, head=True).specs["lm_head"].bits == 8
    for plan in (planned({}), planned({".*": {"bits": 8}}), planned({}, head=True, ignored="lm_head")):
        assert plan.layers["lm_head"].spec is None
        assert plan.parts == plan.blocks
    with pytest.raises(UsageError, match="layer_config: found 'project_in', which names no layer"):
        planned({"project_in": {"bits": 8}})
    with pytest.raises(UsageError, match="quant_lm_head: found no output head in Tiny; needed one that is a linear"):
        resolve(QuantSpec(), "fit", structure(128), [RULES["fake"]], head=True)


def test_a_head_that_does_not_fit_is_kept() -> None:
    odd = replace(LLAMA, outside=(LayerShape(path="lm_head", out_features=250, in_features=128),))
    plan = resolve(QuantSpec(group_size=64), "fit", odd, [RULES["auto_round"]], head=True)
    assert plan.notes == ("lm_head is kept: 250x128 is not a multiple of 32",)


@pytest.mark.parametrize("name", [name for name in RULES if not RULES[name].file_type])
def test_which_formats_hold_a_head(name: str) -> None:
    plan = planned({}, head=True)
    if name == "fake" or name.startswith("auto_round"):
        check_format(plan, RULES[name])
        assert planned({}, name, head=True).specs["lm_head"]
        return
    with pytest.raises(UsageError, match=f"format {name}: found --quant_lm_head; needed off; use auto_round"):
        planned({}, name, head=True)
    for act in (lambda: check_format(plan, RULES[name]), lambda: planned({"lm_head": {"bits": 4}}, name)):
        with pytest.raises(
            UsageError, match=f"format {name}: lm_head: found a quantized output head; .* use auto_round"
        ):
            act()


OWN = st.dictionaries(
    st.sampled_from(["0", "layers.1", "model.layers.0.0", "lm_head", "."]),
    st.one_of(
        st.just("keep"),
        st.fixed_dictionaries(
            {"bits": st.sampled_from(BITS)},
            optional={"group_size": st.sampled_from([-1, 16, 48, 64, 128]), "sym": st.booleans()},
        ),
    ),
    max_size=3,
)


@settings(deadline=None)
@given(SPECS, ROWS, RULE_SETS, st.sampled_from(["fit", "keep", "fail"]), OWN, st.booleans())
def test_every_plan_with_settings_can_be_carried_out(
    spec: QuantSpec, rows: list[int], rules: list[FormatRules], odd: str, own: dict[str, Any], head: bool
) -> None:
    model = replace(structure(*rows, out_features=128), head="lm_head")
    try:
        plan = resolve(spec, odd, model, rules, settings=read_layer_config(own), head=head)
    except UsageError:
        return
    for path, each in plan.specs.items():
        row = plan.layers[path].shape.in_features
        assert row % each.group_of(row) == 0
    for rule in rules:
        check_format(plan, rule)
    for layer in plan.layers.values():
        assert (layer.spec is None) == bool(layer.reason)
