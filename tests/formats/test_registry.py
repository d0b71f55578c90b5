"""Names of layouts."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from autoround.errors import UsageError
from autoround.formats import registry
from autoround.formats.fake import FAKE
from autoround.formats.registry import ABSENT, FORMATS, available, get_format, resolve_name, rules
from autoround.formats.rules import RULES


@pytest.mark.parametrize("name", FORMATS)
def test_every_name_loads_a_layout_with_its_rules(name: str) -> None:
    form = get_format(name)
    assert form.rules is rules(name)
    assert form.rules.name == name


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("AUTO_ROUND", "auto_round"),
        (" auto_round ", "auto_round"),
        ("Auto_Round:Auto_GPTQ", "auto_round:auto_gptq"),
        ("auto_round:awq", "auto_round:auto_awq"),
        ("gptq", "auto_gptq"),
        ("auto_gptq:gptq_v2", "gptq_v2"),
        ("AWQ", "auto_awq"),
        ("compressed-tensors", "llm_compressor"),
    ],
)
def test_spellings(typed: str, name: str) -> None:
    assert resolve_name(typed) == name


def test_a_typo_gets_the_near_name() -> None:
    with pytest.raises(UsageError, match=r"found 'auto_gptk'; needed one of auto_round, .*did you mean auto_gptq\?"):
        rules("auto_gptk")


def test_nonsense_gets_the_list() -> None:
    with pytest.raises(
        UsageError, match=r"needed one of auto_round, .*, llm_compressor, fake, gguf:q2_k_s, .*, gguf:bf16$"
    ):
        rules("zzz")


@pytest.mark.parametrize("name", ABSENT)
def test_known_but_absent_names_get_advice(name: str) -> None:
    with pytest.raises(
        UsageError, match=rf"found {name}, which is not written here; use .*(auto_|gguf:|llm_compressor)"
    ):
        get_format(name)


def test_gguf_file_types_are_known_and_no_folders() -> None:
    assert resolve_name("GGUF:Q4_K") == "gguf:q4_k_m"
    assert rules("gguf:q8_0").file_type == "q8_0"
    with pytest.raises(UsageError, match=r"found 'gguf:q4_k_x'.*did you mean gguf:q4_k_"):
        rules("gguf:q4_k_x")
    with pytest.raises(UsageError, match="found a GGUF file; needed a folder"):
        get_format("gguf:q8_0")


def test_an_object_is_taken_as_it_is() -> None:
    assert get_format(FAKE) is FAKE
    assert rules(FAKE) is FAKE.rules


def test_third_parties(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint(name="Mine", value="autoround.formats.fake:FAKE", group=registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [entry] if group == "autoround.formats" else [])
    assert available() == (*RULES, "mine")
    assert get_format("MINE") is FAKE
    assert rules("mine") is FAKE.rules


def test_rules_need_no_torch() -> None:
    code = "import sys; from autoround.formats.registry import rules; rules('auto_gptq'); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
