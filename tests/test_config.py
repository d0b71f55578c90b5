"""Settings as a YAML file: what is written is read back equal, what is wrong is named."""

from pathlib import Path

import pytest
import torch

from autoround import config
from autoround.data.language import parse_specs
from autoround.errors import JournalError, UsageError
from autoround.recipe import PRESETS, Recipe
from tests.engine.test_bad_input import largest_file

RECIPES = [
    *(Recipe.preset(preset, model="org/model") for preset in PRESETS),
    Recipe(model="m", bits=2, group_size=-1, sym=False, lr=5e-3, format=("auto_round", "fake"), adam=True),
    Recipe(layer_config={"k_proj": {"bits": 8, "sym": False}, r".*\.0\.up": "keep", "q": "W2A16G32"}),
    Recipe(ignore_layers="lm_head,layers.0", dataset='a.jsonl:system_prompt="x: y, z",python-docs:num=3'),
    Recipe(model_dtype="bf16", clip_search=False, keep="best", revision="é", output_dir="out: here"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_is_read_back_equal(recipe: Recipe, tmp_path: Path) -> None:
    config.write(recipe, tmp_path / "run.yaml")
    assert Recipe(**config.read(tmp_path / "run.yaml")) == recipe


def test_every_setting_is_in_the_file_but_the_token(tmp_path: Path) -> None:
    config.write(Recipe(token="secret"), tmp_path / "run.yaml")
    text = (tmp_path / "run.yaml").read_text()
    names = {line.partition(":")[0] for line in text.splitlines() if line[0] not in "#-"}
    assert names == set(Recipe.__dataclass_fields__) - {"token"}
    assert "secret" not in text


def test_specs_are_written_in_the_calibration_language(tmp_path: Path) -> None:
    config.write(Recipe(dataset=parse_specs("a:num=2,b:split=x+y")), tmp_path / "run.yaml")
    assert config.read(tmp_path / "run.yaml")["dataset"] == "a:num=2,b:split=x+y"


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    file, message = tmp_path / "run.yaml", r"run\.yaml: File too large; needed .*; run again"
    with largest_file(100), pytest.raises(JournalError, match=message):
        config.write(Recipe(bits=2), file)
    assert list(tmp_path.iterdir()) == []
    config.write(Recipe(bits=3), file)
    with largest_file(100), pytest.raises(JournalError, match=message):
        config.write(Recipe(bits=2), file)
    assert list(tmp_path.iterdir()) == [file]
    assert config.read(file)["bits"] == 3


@pytest.mark.parametrize("dataset", [torch.zeros(2, 3, dtype=torch.int64), ["a text"]], ids=["tokens", "texts"])
def test_data_in_memory_is_said_to_be_missing(dataset: object, tmp_path: Path) -> None:
    config.write(Recipe(dataset=dataset), tmp_path / "run.yaml")
    assert "# dataset: was given in memory" in (tmp_path / "run.yaml").read_text()
    assert "dataset" not in config.read(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("", {}),
        ("bits: 2\nlr: 5e-3\n", {"bits": 2, "lr": 0.005}),
        ("lr: 1\n", {"lr": 1.0}),
        ("format: [auto_round, fake]\n", {"format": ("auto_round", "fake")}),
        ("format: auto_round, fake\n", {"format": ("auto_round", "fake")}),
        ("sym: null\nbits: 3\n", {"bits": 3}),
        ("layer_config:\n  k_proj: {bits: 8}\n", {"layer_config": {"k_proj": {"bits": 8}}}),
    ],
)
def test_files_by_hand(text: str, settings: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert config.read(tmp_path / "run.yaml") == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("itres: 3", "{file}: itres: found an unknown setting; did you mean 'iters'?"),
        ("bs: 3", "{file}: bs: found an unknown setting; write batch_size"),
        ("qqqqqq: 3", "{file}: qqqqqq: found an unknown setting; auto-round --help lists all"),
        ("iters: many", "{file}: iters: found 'many'; needed a whole number"),
        ("iters: 1.5", "{file}: iters: found 1.5; needed a whole number"),
        ("iters: true", "{file}: iters: found True; needed a whole number"),
        ("lr: fast", "{file}: lr: found 'fast'; needed a number"),
        ("adam: 1", "{file}: adam: found 1; needed true or false"),
        ("sym: 'no'", "{file}: sym: found 'no'; needed true or false"),
        ("model: 7", "{file}: model: found 7; needed text"),
        ("keep: [last]", "{file}: keep: found ['last']; needed text"),
        ("format: 3", "{file}: format: found 3; needed a list of names"),
        ("- bits", "config: {file}: found a list; needed a YAML file of settings, such as `bits: 2`"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        config.read(file)
    assert str(caught.value) == message.format(file=file)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken").write_text("a: [1")
    for name, cause in (("missing", "No such file"), ("binary", "no text"), ("broken", "found no YAML")):
        with pytest.raises(UsageError, match=cause):
            config.read(tmp_path / name)
