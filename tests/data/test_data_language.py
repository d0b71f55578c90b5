"""The dataset mini-language: examples, refusals, and the round trip."""

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoround.data.language import DatasetSpec, format_specs, parse_specs
from autoround.errors import UsageError

NAMES = st.text(min_size=1)
SPECS = st.builds(
    DatasetSpec,
    name=NAMES,
    num=st.none() | st.integers(1, 10**12 - 1),
    split=st.none()
    | st.lists(NAMES.filter(lambda text: "+" not in text and text == text.strip()), min_size=1).map(tuple),
    concat=st.none() | st.booleans(),
    apply_chat_template=st.none() | st.just(True),
    system_prompt=st.none() | st.text(),
    config=st.none() | NAMES,
    column=st.none() | NAMES,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pile-10k", DatasetSpec(name="pile-10k")),
        ("org/name:num=3", DatasetSpec(name="org/name", num=3)),
        ("a:split=train+test", DatasetSpec(name="a", split=("train", "test"))),
        ("a : concat = No : column=body ", DatasetSpec(name="a", concat=False, column="body")),
        ("a:concat:apply_chat_template", DatasetSpec(name="a", concat=True, apply_chat_template=True)),
        ("a:concat=FALSE", DatasetSpec(name="a", concat=False)),
        ("a:concat=1", DatasetSpec(name="a", concat=True)),
        ('"C:\\data, new\\x=1.jsonl":num=2', DatasetSpec(name="C:\\data, new\\x=1.jsonl", num=2)),
        ("a:system_prompt=b=c", DatasetSpec(name="a", system_prompt="b=c")),
        ('a:system_prompt="Say ""hi"": now, = "', DatasetSpec(name="a", system_prompt='Say "hi": now, = ')),
        ('a:system_prompt=""', DatasetSpec(name="a", system_prompt="")),
        ('a:split="train[:10%]"+test', DatasetSpec(name="a", split=("train[:10%]", "test"))),
    ],
)
def test_parse(text: str, expected: DatasetSpec) -> None:
    assert parse_specs(text) == (expected,)
    assert parse_specs(format_specs([expected])) == (expected,)


def test_items_are_separated_by_commas() -> None:
    assert parse_specs('a:num=1, "b,c" ,a:num=2') == (
        DatasetSpec(name="a", num=1),
        DatasetSpec(name="b,c"),
        DatasetSpec(name="a", num=2),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pile-10k:train", "unknown option 'train'.*split=train"),
        ("a:nmu=3", "unknown option 'nmu'.*did you mean 'num'"),
        ("a:Num=3", "did you mean 'num'"),
        ("C:\\x.jsonl", "needs double quotes"),
        ("a:num=1:num=2", "'num' twice"),
        ("a:num=0", "num=0.*1 or more"),
        ("a:num=-3", "num=-3.*1 or more"),
        ("a:num=1_0", "num=1_0"),
        ("a:num=1.5", "num=1.5"),
        ("a:num", "'num' without a value"),
        ("a:column=", "'column' without a value"),
        ('a:column=""', "empty column"),
        ("a:concat=maybe", "concat=maybe.*true, yes, 1, false, no, 0"),
        ("a:split=x++y", "split='x"),
        ("a:system_prompt=x:apply_chat_template=False", "needs the chat template"),
        ('a:column="b', "never closed"),
        ("a,,b", "empty item"),
        ("a,", "empty item"),
        ("", "empty item"),
        ("num=3", "'num=3' where a name is needed"),
        ("a::num=3", "unknown option ''"),
    ],
)
def test_refusals(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_specs(text)


@given(st.lists(SPECS, min_size=1, max_size=3))
def test_round_trip(specs: list[DatasetSpec]) -> None:
    assert parse_specs(format_specs(specs)) == tuple(specs)


@given(st.text(alphabet='ab1 ,:="+\\\n') | st.text())
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        specs = parse_specs(text)
    except UsageError:
        return
    assert parse_specs(format_specs(specs)) == specs


def test_specs_validate_themselves() -> None:
    for wrong in ({"num": 0}, {"num": True}, {"split": ()}, {"split": ("a+b",)}, {"config": ""}, {"name": ""}):
        with pytest.raises(UsageError):
            dataclasses.replace(DatasetSpec(name="a"), **wrong)


def test_the_language_imports_neither_torch_nor_hugging_face() -> None:
    code = (
        "import sys, autoround.data.language; sys.exit(bool({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
