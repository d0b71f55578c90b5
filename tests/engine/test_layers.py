"""Settings of single layers: from words to values, and to the layers they name."""

import json
from pathlib import Path
from typing import Any

import pytest

from autoround.errors import UsageError
from autoround.layers import LayerSetting, assign, read_ignored, read_layer_config
from autoround.recipe import Recipe
from autoround.spec import QuantSpec

PATHS = [f"model.layers.{block}.{layer}" for block in (0, 1, 10) for layer in ("self_attn.k_proj", "mlp.down_proj")]
BOTH = {"k_proj": {"bits": 8}, ".*down": {"bits": 2, "group_size": -1, "sym": False, "scale_dtype": "bf16"}}
WIDE = {"bits": 8, "group_size": 128, "sym": True}


def read(given: object) -> dict[str, dict[str, Any]]:
    return {each.pattern: {"keep": True} if each.keep else dict(each.changes) for each in read_layer_config(given)}


@pytest.mark.parametrize(
    "given",
    [
        BOTH,
        json.dumps(BOTH),
        "{k_proj:{bits:8},.*down:{bits:2,group_size:-1,sym:false,scale_dtype:bf16}}",
        "{k_proj: {bits: 8}, '.*down': {bits: 2, group_size: -1, sym: no, scale_dtype: bfloat16}}",
    ],
    ids=["mapping", "json", "relaxed", "yaml"],
)
@pytest.mark.parametrize("file", ["", "layers.json", "layers.yaml"])
def test_every_way_of_writing_means_the_same(given: Any, file: str, tmp_path: Path) -> None:
    if file:
        (tmp_path / file).write_text(given if isinstance(given, str) else json.dumps(given))
        given = tmp_path / file
    expected = BOTH | {".*down": BOTH[".*down"] | {"scale_dtype": "bfloat16"}}
    assert read(given) == expected
    assert read_layer_config(read_layer_config(given)) == read_layer_config(given)


def test_a_file_in_the_form_that_people_write(tmp_path: Path) -> None:
    text = "# by hand\nk_proj: W8A16\n'layers\\.[0-3]\\.':\n  group_size: 32\nlm_head: keep\nup_proj: {bits: 16}\n"
    (tmp_path / "own.yml").write_text(text)
    expected = {"k_proj": WIDE, r"layers\.[0-3]\.": {"group_size": 32}, "lm_head": {"keep": True},
                "up_proj": {"keep": True}}  # fmt: skip
    assert read(tmp_path / "own.yml") == expected


SCHEME = {
    "bits": 8, "group_size": 32, "sym": True, "data_type": "int", "act_bits": None, "act_group_size": None,
    "act_sym": None, "act_data_type": None, "act_dynamic": None, "super_bits": None,
    "super_group_size": None, "rotation_config": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (SCHEME, {"bits": 8, "group_size": 32, "sym": True}),
        (SCHEME | {"act_bits": 16, "act_sym": True, "act_data_type": "fp"}, {"bits": 8, "group_size": 32, "sym": True}),
        ({"act_bits": 16, "data_type": "int"}, {}),
        ({"bits": 16, "act_bits": 16, "data_type": "float"}, {"keep": True}),
        ({"bits": 2, "act_bits": 32, "act_dynamic": True}, {"bits": 2}),
        ({"scheme": "W8A16", "group_size": 32}, WIDE | {"group_size": 32}),
    ],
    ids=["a whole scheme", "said", "these alone", "unquantized", "without bits", "a base"],
)
def test_what_auto_round_writes_beside_them(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read({"k_proj": given}) == read(json.dumps({"k_proj": given})) == {"k_proj": expected}


@pytest.mark.parametrize("given", ["", " ", {}, "{}", ()])
def test_nothing_is_no_settings(given: object) -> None:
    assert read_layer_config(given) == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{k:{bitz:8}}", "layer_config: k: found unknown setting 'bitz'; known are bits, group_size, sym, scale_dtype"),
        ("{k:{bits:5}}", "layer_config: k: bits: found 5; needed one of 2, 3, 4, 8"),
        ("{k:{bits:true}}", "layer_config: k: bits: found True; needed a whole number"),
        ("{k:{bits:8.0}}", "layer_config: k: bits: found 8.0; needed a whole number"),
        ("{k:{sym:1}}", "layer_config: k: sym: found 1; needed true or false"),
        ("{k:{group_size:0}}", "layer_config: k: group_size: found 0; needed a positive number"),
        ("{k:{scale_dtype:fp8}}", "layer_config: k: scale_dtype: found 'fp8'; needed one of float16, "),
        ("{k:{act_bits:8}}", "layer_config: k: act_bits: found 8; needed 16: activations stay in 16 bits ("),
        ("{k:{data_type:mx_fp}}", "layer_config: k: data_type: found 'mx_fp'; needed int: weights are stored as"),
        ("{k:{super_bits:6}}", "layer_config: k: super_bits: found 6; needed none: a GGUF file type decides it; "),
        ("{k:{rotation_config:a}}", "layer_config: k: rotation_config: found 'a'; needed none: weights are rounded w"),
        ("{k:{scheme:8}}", "layer_config: k: scheme: found 8; needed a name such as W8A16"),
        ("{k:{scheme:INT8}}", "layer_config: k: scheme: found 'INT8'; needed W2A16, "),
        ("{k: W9A16X}", "layer_config: k: scheme: found 'W9A16X'; needed W2A16, "),
        ("{k: {}}", "layer_config: k: found {}; needed a scheme such as W8A16, settings such as {bits: 8}, or keep"),
        ("{k:}", "layer_config: k: found None; needed a scheme"),
        ("{k: 8}", "layer_config: k: found 8; needed a scheme"),
        ("{'(k':{bits:8}}", "layer_config: found '(k', no regular expression (missing ), "),
        ("{layers.[01]:{bits:8}}", "layer_config: found text that is neither JSON nor YAML (expected ',' or '}', but "),
        ("{", "layer_config: found text that is neither JSON nor YAML ("),
        (
            "nothing.json",
            "layer_config: [Errno 2] No such file or directory: 'nothing.json'; needed a JSON or YAML file",
        ),
        ([1], "layer_config: found [1]; needed a mapping from layer or pattern to settings"),
    ],
)
def test_what_cannot_be_is_refused(given: object, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe(layer_config=given)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_file_that_holds_something_else(tmp_path: Path) -> None:
    for text, message in (
        ("- a\n- b\n", r"found \['a', 'b'\]; needed a mapping"),
        ("a: b: c", "neither JSON nor YAML"),
    ):
        (tmp_path / "own.yaml").write_text(text)
        with pytest.raises(UsageError, match=message):
            read_layer_config(tmp_path / "own.yaml")


def test_layers_to_ignore() -> None:
    expected = ("lm_head", "layers.0", "(q|k)_proj")
    for given in (
        "lm_head, layers.0,(q|k)_proj,",
        list(expected),
        expected,
        read_ignored("lm_head,layers.0,(q|k)_proj"),
    ):
        found = read_ignored(given)
        assert tuple(each.pattern for each in found) == expected
        assert all(each.keep and each.flag == "ignore_layers" for each in found)
    with pytest.raises(UsageError, match=r"ignore_layers: found 3; needed a comma list of paths"):
        read_ignored(3)
    with pytest.raises(UsageError, match=r"ignore_layers: found '\(', no regular expression"):
        Recipe(ignore_layers="(")


def changes(config: object, ignored: str = "") -> dict[str, object]:
    """Path without its beginning -> bits, or "keep"."""
    found = assign((*read_layer_config(config), *read_ignored(ignored)), PATHS, ["lm_head"])
    return {
        path.removeprefix("model.layers."): "keep" if each.keep else dict(each.changes)["bits"]
        for path, each in found.items()
    }


def test_which_layers_a_setting_is_about() -> None:
    assert changes({"k_proj": {"bits": 8}}) == dict.fromkeys((f"{block}.self_attn.k_proj" for block in (0, 1, 10)), 8)
    both = {f"1.{layer}": 8 for layer in ("self_attn.k_proj", "mlp.down_proj")}
    assert changes({"layers.1": {"bits": 8}}) == both  # and not the tenth
    assert changes({"model.layers.1": {"bits": 8}}) == both
    assert changes({r"layers\.\d\.mlp": {"bits": 8}}) == {"0.mlp.down_proj": 8, "1.mlp.down_proj": 8}
    assert changes({PATHS[0]: {"bits": 8}}) == {"0.self_attn.k_proj": 8}
    assert changes({"^model.layers.0.mlp.down_proj$": {"bits": 8}}) == {"0.mlp.down_proj": 8}
    assert changes({}, ignored="lm_head") == {}  # is kept anyway


def test_which_setting_wins() -> None:
    down = "model.layers.0.mlp.down_proj"
    assert changes({"down": {"bits": 8}, "mlp": {"bits": 2}})["0.mlp.down_proj"] == 2
    assert changes({down: {"bits": 8}, "mlp": {"bits": 2}})["0.mlp.down_proj"] == 8
    assert changes({down: {"bits": 8}, "mlp": {"bits": 2}})["1.mlp.down_proj"] == 2
    assert changes({"mlp": "keep", "layers.0.mlp": {"bits": 3}}) == {
        "0.mlp.down_proj": 3, "1.mlp.down_proj": "keep", "10.mlp.down_proj": "keep"}  # fmt: skip
    assert changes({"mlp": {"bits": 3}, "layers.0.mlp": "keep"})["0.mlp.down_proj"] == "keep"
    assert changes({down: {"bits": 8}}, ignored="mlp")["0.mlp.down_proj"] == "keep"
    own = assign(read_layer_config({"mlp": {"bits": 8}, "layers.0": {"group_size": 32}}), PATHS)[down]
    assert own.over(QuantSpec(sym=False)) == QuantSpec(bits=8, group_size=32, sym=False)


@pytest.mark.parametrize(
    ("config", "ignored", "message"),
    [
        ({"k_porj": {"bits": 8}}, "", "layer_config: found 'k_porj', which names no layer; .* did you mean k_proj"),
        ({"zzz": {"bits": 8}}, "", "'zzz', .*; needed a path such as model.layers.0.self_attn.k_proj, or .* of one$"),
        ({"model.layers.2.mlp.down_proj": "keep"}, "", "did you mean .*model.layers.1.mlp.down_proj"),
        ({}, "self_atn", "ignore_layers: found 'self_atn', .*did you mean self_attn"),
        ({"lm_head": {"bits": 8}}, "", "layer_config: found 'lm_head', which names no layer"),
    ],
)  # fmt: skip
def test_settings_that_name_nothing(config: object, ignored: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        changes(config, ignored)


def test_recipes_with_settings_are_values() -> None:
    recipe = Recipe(layer_config="{k_proj: W8A16}", ignore_layers="down")
    assert recipe == Recipe(layer_config={"k_proj": "w8a16"}, ignore_layers=["down"])
    assert hash(recipe) == hash(Recipe(layer_config=recipe.layer_config, ignore_layers=recipe.ignore_layers))
    keep = LayerSetting(pattern="down", keep=True, flag="ignore_layers")
    assert recipe.layer_settings == (LayerSetting(pattern="k_proj", changes=tuple(WIDE.items())), keep)
