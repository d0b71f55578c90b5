"""One name for each setting, and a page that has them all."""

from autoround.cli.commands import SUBCOMMANDS, find
from autoround.cli.data import Shown
from autoround.cli.grammar import SWITCHES
from autoround.cli.quantize import Files, grammar
from autoround.evaluate.settings import Evaluation
from autoround.options import settings_of
from autoround.recipe import Recipe
from tests.cli.settings_page import GROUPS, PAGE, page


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "make docs"


def test_the_page_has_every_setting_once() -> None:
    names = [line.split("`")[1] for line in page().splitlines() if line.startswith("| `")]
    known = {*settings_of(Recipe), *settings_of(Evaluation), *settings_of(Files), *settings_of(Shown), *SWITCHES}
    for name in known:
        assert names.count(name) == 1, name
    assert {each.option["group"] for each in settings_of(Recipe).values()} == set(GROUPS)


def test_a_name_means_the_same_in_every_command() -> None:
    whole = grammar("default").settings
    for command in SUBCOMMANDS:
        for name, each in find(command).GRAMMAR.settings.items():
            if name in whole:
                assert each.option["flags"] == whole[name].option["flags"], f"{command} --{name}"
                assert each.field.type == whole[name].field.type, f"{command} --{name}"
            else:
                assert name in settings_of(Shown), f"{command} --{name}"
