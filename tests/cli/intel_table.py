"""What becomes of Intel's command lines, flags and schemes here, as data and as docs/coming_from_auto_round.md.

``python -m tests.cli.intel_table`` writes that page; tests/golden/record_intel_commands.py recorded what auto-round
0.16.1 makes of the command lines.
"""

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from autoround.cli.commands import SUBCOMMANDS, find
from autoround.cli.quantize import check, grammar, parse
from autoround.errors import UsageError
from autoround.formats.registry import ABSENT, ALIASES, resolve_name
from autoround.intel.words import COMMANDS, DEPENDENT, FORMATS, REFUSED, SCHEMES, SYNONYMS, TAKEN
from autoround.recipe import PRESETS, Recipe

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "coming_from_auto_round.md"
# Fields that both have by the same name and that must come to the same.
SAME = (
    "model", "iters", "bits", "group_size", "sym", "seqlen", "batch_size", "lr", "minmax_lr", "momentum",
    "gradient_accumulate_steps", "seed", "quant_lm_head", "low_gpu_mem_usage",
)  # fmt: skip
# Of their light recipe, whatever the bits.
LIGHT_RATE = 0.005
SEARCH = "their search for scales takes data; here it is off with `--iters 0` unless `--enable_opt_rtn` is given"


class Line(NamedTuple):
    """A command line of Intel's documentation: where it is, and what auto-round 0.16.1 makes of it."""

    revision: str
    file: str
    command: str
    theirs: dict[str, Any]

    @property
    def words(self) -> list[str]:
        """The command's name and its words, without variables of the environment."""
        words = [word for word in shlex.split(self.command) if "=" not in word or word.startswith("-")]
        return ["auto-round", *words[3:]] if words[0].startswith("python") else words


class Verdict(NamedTuple):
    """What this package makes of a line.

    Attributes:
        refused: the message; empty where it is accepted.
        recipe: None where it is refused, or quantizes nothing.
        notes: what is told beside.
    """

    refused: str = ""
    recipe: Recipe | None = None
    notes: tuple[str, ...] = ()


def lines() -> list[Line]:
    """Every recorded command line."""
    return [Line(**line) for line in json.loads((HERE / "intel_commands.json").read_text())]


def judge(line: Line) -> Verdict:
    """Parse a line as the command that it calls."""
    name, *words = line.words
    preset = name.replace("_", "-").removeprefix("auto-round").removeprefix("-").replace("-", "_") or "default"
    if preset == "eval":
        preset, words = "default", ["eval", *words]
    if preset not in PRESETS:
        return Verdict(f"no command {name}; use auto-round")
    try:
        if words[0] in SUBCOMMANDS:
            module = find(words[0])
            values = module.GRAMMAR.read(words[1:])
            if words[0] == "list":
                module.run(values)
            return Verdict()
        if words[0] in COMMANDS:
            return Verdict(f"{words[0]}: {COMMANDS[words[0]]}")
        command = parse(words, preset)
        check(command.recipe)
    except UsageError as error:
        return Verdict(str(error))
    return Verdict(recipe=command.recipe, notes=command.notes)


def differences(recipe: Recipe, theirs: Mapping[str, Any]) -> list[str]:
    """Where a recipe is not what auto-round 0.16.1 resolves."""
    spec = recipe.spec
    ours = {name: getattr(recipe, name) for name in SAME} | {
        "bits": spec.bits, "group_size": spec.group_size, "sym": spec.sym,
        "formats": list(map(resolve_name, recipe.format)),
        "data_type": "int", "act_bits": 16,
        "enable_adam": recipe.adam,
    }  # fmt: skip
    if theirs["lr"] == LIGHT_RATE and recipe.lr is None:  # ours follows from steps and bits
        ours.pop("lr")
    if recipe.needs_data:
        ours |= {"nsamples": recipe.nsamples, "dataset": recipe.dataset}
    if recipe.format[0].startswith("gguf:"):  # the file type decides
        ours = {name: value for name, value in ours.items() if name not in ("bits", "group_size", "sym", "data_type")}
    ours["patterns"] = [each.pattern for each in recipe.layer_settings]
    asked = theirs["ignore_layers"].split(",") if theirs["ignore_layers"] else []
    both = theirs | {"patterns": [*_patterns(theirs["layer_config"]), *asked]}
    return [f"{name}: {value!r}, not {both[name]!r}" for name, value in ours.items() if both[name] != value]


def _patterns(layer_config: str | None) -> list[str]:
    return [each.pattern for each in Recipe(layer_config=layer_config or ()).layer_config]


def searched_there_alone(recipe: Recipe, theirs: Mapping[str, Any]) -> bool:
    """Whether auto-round searches scales on data where this package does not."""
    return bool(theirs.get("searches")) and not recipe.searches_clips


def page() -> str:
    """The whole page."""
    return "\n\n".join([_HEAD, _commands(), _flags(), _schemes(), _PYTHON]) + "\n"


def _commands() -> str:
    found = lines()
    accepted = sum(not judge(line).refused for line in found)
    text = (
        f"## Command lines\n\n{len(found)} command lines of Intel's README and docs: {accepted} are accepted. {_SAME}"
    )
    rows = [(f"`{line.command}`", _said(line), f"{line.file} {line.revision}") for line in found]
    return f"{text}\n\n{_table(('command', 'here', 'found in'), rows)}"


def _said(line: Line) -> str:
    verdict = judge(line)
    if verdict.refused:
        return f"refused: {verdict.refused}"
    notes = list(verdict.notes)
    if "error" in line.theirs:
        notes.append(f"auto-round 0.16.1 refuses it: {line.theirs['error']}")
    if verdict.recipe and searched_there_alone(verdict.recipe, line.theirs):
        notes.append(SEARCH)
    return "; ".join(["accepted", *notes])


def _flags() -> str:
    known = grammar("default").spellings()
    names = sorted({_plain(flag) for flag in (HERE / "golden" / "auto_round_0_16_flags.txt").read_text().split()})
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_fate(name, known), []).append(f"`--{name}`")
    rows = sorted(((", ".join(flags), fate) for fate, flags in groups.items()), key=lambda row: (row[1][:7], row[0]))
    return f"## Flags of auto-round 0.16.1\n\n{_table(('flags', 'here'), rows)}"


def _plain(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _fate(name: str, known: Mapping[str, str]) -> str:
    if name in known:
        return "the same" if known[name] == name else f"taken: `--{known[name]}`"
    name = SYNONYMS.get(name, name)
    if name in DEPENDENT:
        return f"taken: {DEPENDENT[name]}"
    return f"taken: {TAKEN[name].meaning}" if name in TAKEN else f"refused: {REFUSED[name]}"


def _schemes() -> str:
    groups: dict[str, list[str]] = {}
    for name, reason in SCHEMES.items():
        groups.setdefault(f"refused: {reason}", []).append(f"`{name}`")
    rows = [
        ("`W2A16` `W3A16` `W4A16` `W8A16`, with `G32`, `G64` …", "the same"),
        ("`GGUF:…`, as a scheme", "taken: `--format gguf:…`; beside another format it is refused"),
        *((" ".join(names), reason) for reason, names in groups.items()),
        ("`layer_config` with `scheme`, `data_type: int`, `act_bits: 16`, `act_…`, null", "taken: weight-only as here"),
        ("`layer_config` with other `act_bits` or `data_type`, `super_…`, `rotation_config`", "refused by name"),
        *((f"format `{name}`", f"the same as `{meant}`") for name, meant in ALIASES.items()),
        *((f"format `{name}`", f"refused: {reason}") for name, reason in FORMATS.items()),
        *((f"format `{name}`", f"refused: use {other}") for name, other in ABSENT.items() if name not in FORMATS),
    ]
    return f"## Schemes and formats\n\n{_table(('name', 'here'), rows)}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    cells = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


_HEAD = """\
# Coming from Intel's auto-round

Written by `make intel-table` from what the parser answers. Everything that auto-round 0.16.1 takes either works here or
is refused by name with what to use; what works and means nothing here is told in one line. Activation quantization,
floating-point weights, MLX and diffusion are out of scope."""
_SAME = (
    "Model, scheme, bits, group size, symmetry, steps, rates, rows, formats and layer settings of an accepted line are "
    "what auto-round 0.16.1 resolves, as a test compares; differences are named. Output folders are our own. "
    "Whether a model's architecture is one of those taken shows when it is opened."
)
_PYTHON = """\
## Python

```python
from autoround import AutoRound

rounded = AutoRound("Qwen/Qwen3-0.6B", scheme="W4A16", dataset=["some text", "more text"], iters=200)
model, folder = rounded.quantize_and_save("out", format="auto_round")
```

Arguments are the fields of `Recipe` and, as the flags above, what auto-round has beside them. The model may be a
transformers model in memory, which is not changed; the dataset a name, texts, chats, rows of token ids or a DataLoader.
`quantize()` gives the model with quantized weights in floating point and the settings of its layers; the model is
loaded only if it is looked at. `save_quantized(folder, format=…)` writes what `quantize()` made. An argument that
neither package has is a `TypeError`. A folder that is not empty is only overwritten with `overwrite=True`.

Both packages may be installed in one environment: their modules are `autoround` and `auto_round`. Commands have the
same names there and belong to the package installed last; `python -m autoround` is always this one."""


if __name__ == "__main__":
    PAGE.write_text(page())
