"""Every setting as docs/settings.md, from the tables that the parser is made of.

``python -m tests.cli.settings_page`` writes that page.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from autoround.cli.commands import SUBCOMMANDS, find
from autoround.cli.data import Shown
from autoround.cli.grammar import SWITCHES, Grammar
from autoround.cli.quantize import Files, grammar, program
from autoround.evaluate.settings import Evaluation
from autoround.options import Setting, settings_of
from autoround.recipe import PRESETS, Recipe

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
GROUPS = {
    "model": "Model",
    "scheme": "Scheme",
    "output": "Output",
    "calibration": "Calibration",
    "tuning": "Tuning",
    "device": "Device",
}
HEAD = """\
# Settings

Written by `make docs` from the tables that the parser is made of. A setting has one name: it is the field of
`autoround.Recipe` or `autoround.evaluate.Evaluation`, the flag `--name`, and, of a recipe, the key in the YAML file of
`--config`. Flags may be written with dashes; other spellings are flags alone. A flag wins over the file, and the file
over the recipe of the command. Every run leaves the file that repeats it in its journal: `run.yaml`, without the token.
An empty default is said in the meaning."""
FOOT = """\
Values of the calibration language, of `layer_config` and of GGUF file types are described in the
[README](../README.md); `auto-round list formats|schemes|datasets|recipes` prints names. What Intel's tool calls
otherwise is in [coming_from_auto_round.md](coming_from_auto_round.md)."""


def page() -> str:
    """The whole page."""
    recipe, evaluation = settings_of(Recipe), settings_of(Evaluation)
    parts = [HEAD]
    for group, title in GROUPS.items():
        own = {name: each for name, each in recipe.items() if each.option["group"] == group}
        parts.append(f"## {title}\n\n{_settings(own)}")
    parts.append(f"## Recipes\n\n{_recipes()}")
    parts.append(f"## Evaluation\n\n{_settings(evaluation)}")
    parts.append(f"## The command line alone\n\n{_settings(settings_of(Files) | settings_of(Shown), switches=True)}")
    return "\n\n".join([*parts, FOOT]) + "\n"


def _settings(settings: Mapping[str, Setting], *, switches: bool = False) -> str:
    rows = [(f"`{name}`", _default(each), _meaning(each), _spellings(each), _takers(name))
            for name, each in settings.items()]  # fmt: skip
    if switches:
        rows += [(f"`{name}`", "off", text, "", _takers(name)) for name, text in SWITCHES.items()]
    return _table(("setting", "default", "meaning", "other flags", "taken by"), rows)


def _meaning(setting: Setting) -> str:
    choices = setting.option["choices"]
    return setting.option["help"] + (f" (`{'` `'.join(choices)}`)" if choices else "")


def _default(setting: Setting) -> str:
    default = setting.field.default
    if default in (None, "", ()):
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{','.join(default) if isinstance(default, tuple) else default}`"


def _spellings(setting: Setting) -> str:
    option = setting.option
    same = [f"`--{flag}`" for flag in option["flags"]]
    return ", ".join([*same, *(f"`--{flag}` for off" for flag in option["off_flags"])])


def _takers(name: str) -> str:
    commands: dict[str, Grammar] = {"auto-round": grammar("default")}
    commands |= {command: find(command).GRAMMAR for command in SUBCOMMANDS}
    return ", ".join(command for command, each in commands.items() if name in each.settings or name in each.switches)


def _recipes() -> str:
    rows = [
        (
            f"`{name}`",
            f"`{program(name)}`",
            ", ".join(f"`{key}: {str(value).lower()}`" for key, value in changes.items()),
        )
        for name, changes in PRESETS.items()
    ]
    return _table(("`Recipe.preset`", "command", "differs from the defaults in"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    cells = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
