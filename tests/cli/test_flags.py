"""Words of the command line -> recipe: presets, overrides, spellings, refusals."""

from dataclasses import asdict
from pathlib import Path

import pytest

from autoround.cli.quantize import grammar, parse, program
from autoround.cli.refused import FLAGS
from autoround.errors import UsageError
from autoround.intel.words import DEPENDENT, SYNONYMS, TAKEN
from autoround.options import settings_of
from autoround.recipe import PRESETS, Recipe
from autoround.spec import QuantSpec

GOLDEN = Path(__file__).parent / "golden"

# (iters, nsamples, lr, clip search) of each command, with the learning rate at 4 bits.
RESOLVED = {
    "default": (200, 128, 0.5 / 200, True),
    "best": (1000, 512, 0.5 / 1000, True),
    "light": (50, 128, 0.5 / 50, True),
    "rtn": (0, 128, 0.5, False),
    "opt_rtn": (0, 128, 0.5, True),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_command_runs_its_recipe(preset: str) -> None:
    recipe = parse(["m"], preset).recipe
    assert recipe == Recipe.preset(preset, model="m")
    found = (recipe.iters, recipe.nsamples, recipe.learning_rate(bits=4), recipe.searches_clips)
    assert found == RESOLVED[preset]
    assert (recipe.batch_size, recipe.seqlen, recipe.spec) == (8, 2048, QuantSpec(bits=4, group_size=128, sym=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_flag_wins_over_the_recipe_and_leaves_the_rest(preset: str) -> None:
    changed = parse(["m", "--iters", "7"], preset).recipe
    usual = asdict(Recipe.preset(preset, model="m"))
    given = {name: value for name, value in PRESETS[preset].items() if name != "iters"}
    assert changed.iters == 7
    assert {name: value for name, value in asdict(changed).items() if name in given} == {
        name: usual[name] for name in given
    }


# Every command line of the mission that quantizes, and what it must mean beside the model.
COMMANDS: list[tuple[str, str, dict[str, object]]] = [
    ("default", "--model Qwen/Qwen3-0.6B --scheme W4A16 --format auto_round", {"model": "Qwen/Qwen3-0.6B"}),
    ("best", "--model m --scheme W4A16", {}),
    ("light", "--model m --scheme W4A16", {}),
    (
        "default",
        "--model m --bits 4 --group_size 128 --format auto_round,auto_awq,auto_gptq --output_dir out",
        {"bits": 4, "group_size": 128, "format": ("auto_round", "auto_awq", "auto_gptq"), "output_dir": "out"},
    ),
    ("default", "--model m --bits 4 --iters 0", {"bits": 4, "iters": 0}),
    ("default", "--model m --device_map 0,1,2,3", {"device_map": "0,1,2,3"}),
    (
        "default",
        "m --dataset a.jsonl:num=64,python-docs --bs 4 --seqlen 512 --nsamples 64 --lr 0.01",
        {"dataset": "a.jsonl:num=64,python-docs", "batch_size": 4, "seqlen": 512, "nsamples": 64, "lr": 0.01},
    ),
    (
        "default",
        "m --low_gpu_mem_usage --enable_torch_compile --adam",
        {"low_gpu_mem_usage": True, "torch_compile": True, "adam": True},
    ),
]


@pytest.mark.parametrize(("preset", "line", "settings"), COMMANDS, ids=[line for _, line, _ in COMMANDS])
def test_the_documented_commands(preset: str, line: str, settings: dict[str, object]) -> None:
    assert parse(line.split(), preset).recipe == Recipe.preset(preset, **{"model": "m", **settings})


def test_rounding_to_nearest_needs_no_data() -> None:
    assert not parse(["m", "--iters", "0"], "default").recipe.needs_data
    assert parse(["m"], "opt_rtn").recipe.needs_data


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--model_name", "x"], "model", "x"),
        (["--model-name-or-path=x"], "model", "x"),
        (["--bits", "3", "x"], "model", "x"),
        (["--group-size", "-1"], "group_size", -1),
        (["--group_size=-1"], "group_size", -1),
        (["--train_bs", "2"], "batch_size", 2),
        (["--bs=2"], "batch_size", 2),
        (["--train-batch-size", "2"], "batch_size", 2),
        (["--enable_adam"], "adam", True),
        (["--seq_len", "64"], "seqlen", 64),
        (["--nsample", "9"], "nsamples", 9),
        (["--iter", "9"], "iters", 9),
        (["--device", "cpu"], "device_map", "cpu"),
        (["--sym"], "sym", True),
        (["--asym"], "sym", False),
        (["--disable-torch-compile"], "torch_compile", False),
        (["--disable_trust_remote_code"], "trust_remote_code", False),
        (["--no_clip_search"], "clip_search", False),
        (["--formats", "[auto_round,auto_gptq]"], "format", ("auto_round", "auto_gptq")),
        (["--format", "[auto_round, AUTO_GPTQ,auto_round]"], "format", ("auto_round", "auto_gptq")),
        (["--format", "gguf:Q4_K_M"], "format", ("gguf:q4_k_m",)),
        (["--model_dtype", "bf16"], "model_dtype", "bfloat16"),
        (["--lr", "1", "--lr", "2"], "lr", 2.0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_spellings(words: list[str], field: str, value: object) -> None:
    words = words if field == "model" else ["m", *words]
    assert asdict(parse(words, "default").recipe)[field] == value


def test_switches_of_the_command_itself() -> None:
    command = parse(["m", "--dry-run", "--quiet", "--debug"], "default")
    assert command.dry_run and command.quiet and command.debug
    assert not parse(["m"], "default").dry_run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model: found none; needed a hub name, folder or .gguf file; try auto-round --help"),
        (["a", "--model", "b"], "model: found 'a' and 'b'; needed one"),
        (["a", "b"], "found 'b', which belongs to no flag; needed one model; quote values that have spaces"),
        (["m", "-x"], "found '-x', which belongs to no flag; needed one model; quote values that have spaces"),
        (["m", "--itres", "3"], "found unknown flag --itres; did you mean '--iters'?"),
        (["m", "--qqqqqqqq"], "found unknown flag --qqqqqqqq; --help lists all"),
        (["m", "--iters", "many"], "--iters: found 'many'; needed a whole number"),
        (["m", "--iters", "1.5"], "--iters: found '1.5'; needed a whole number"),
        (["m", "--lr", "fast"], "--lr: found 'fast'; needed a number"),
        (["m", "--lr", "nan"], "lr: found nan; needed a positive number"),
        (["m", "--bs"], "--batch_size: expected one argument"),
        (["m", "--keep", "first"], "keep: found 'first'; needed one of last, best"),
        (["m", "--format", "[]"], "format: found none; needed at least one, such as auto_round"),
        (["m", "--nsamples", "0"], "nsamples: found 0; needed at least 1"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(words, "default")
    assert str(caught.value) == message


def test_no_flag_is_both_taken_and_refused() -> None:
    assert not set(grammar("default").spellings()) & set(FLAGS)


@pytest.mark.parametrize("flag", (GOLDEN / "auto_round_0_16_flags.txt").read_text().split())
def test_every_flag_of_auto_round_0_16_is_taken_or_refused_by_name(flag: str) -> None:
    name = flag.removeprefix("--").replace("-", "_")
    if name in {*grammar("default").spellings(), *TAKEN, *DEPENDENT, *SYNONYMS}:
        return
    with pytest.raises(UsageError) as caught:
        parse(["m", flag, "value"], "default")
    assert str(caught.value) == f"{flag}: {FLAGS[name]}"


def test_flags_are_frozen() -> None:
    """A flag added or removed on purpose changes this file in the same commit."""
    found = "".join(f"--{spelling} {flag}\n" for spelling, flag in sorted(grammar("default").spellings().items()))
    assert found == (GOLDEN / "flags.txt").read_text()


@pytest.mark.parametrize("preset", PRESETS)
def test_help_tells_every_setting_and_its_default(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], preset)
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert text.startswith(f"usage: {program(preset)} MODEL [flags]")
    assert [name for name in settings_of(Recipe) if f" --{name} " not in text] == []
    assert f"0 takes none [default {RESOLVED[preset][0]}; also --iter]" in text
    assert f"rows of calibration tokens [default {RESOLVED[preset][1]}; also --nsample]" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--version"], "light")
    assert capsys.readouterr().out == "auto-round-light 0.1.0\n"


def test_a_config_file_stands_between_recipe_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\niters: 7\nbits: 2\n")
    command = parse(["--config", str(file), "--bits", "3"], "best")
    assert command.recipe == Recipe.preset("best", model="m", iters=7, bits=3)
    other = parse(["other", f"--config={file}"], "light").recipe
    assert other == Recipe.preset("light", model="other", iters=7, bits=2)
