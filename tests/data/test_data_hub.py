"""Hub datasets through the real client libraries against a local hub, each case in its own process."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, Features, Image, List, Value

from autoround.data.hub_names import resolve
from autoround.errors import DataError
from tests.fakehub import FakeHub

REPO = Path(__file__).parents[2]
READ = """
import json, logging, random, sys
from autoround.data.language import parse_specs
from autoround.data.sources import open_source
from autoround.errors import DataError
from autoround.log import LOGGER
notes = []
LOGGER.addFilter(lambda record: notes.append(record.getMessage()))
for text in sys.argv[1:]:
    spec, = parse_specs(text)
    notes.clear()
    try:
        source = open_source(spec, rng=random.Random(1), rows=2)
        found = list(source.documents)
        ends = [min(map(str, found)), max(map(str, found))]
        result = {"first": found[:3], "count": len(found), "ends": ends, "origin": source.origin}
    except DataError as error:
        result = {"error": str(error)}
    print(json.dumps({**result, "notes": notes}, default=len))
"""
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def read(environment: dict[str, str], *items: str) -> list[dict[str, object]]:
    """The documents, or the error, of every item."""
    done = subprocess.run(
        [sys.executable, "-c", READ, *items], env=environment, cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _table(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


def _pictured(root: Path) -> Path:
    """A dataset of images and chats that show them, as ``datasets`` writes it: bytes, of which it makes pictures."""
    features = Features(
        {
            "images": List(Image()),
            "messages": [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}],
        }
    )
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}, {"type": "image", "text": None}]
    chat = [{"role": "user", "content": parts}]
    images = [[{"bytes": b"1" * (row + 1), "path": None}, {"bytes": b"12", "path": None}] for row in range(6)]
    table = Dataset.from_dict({"images": images, "messages": [chat] * 6}, features=features)
    (root / "data").mkdir(parents=True)
    table.to_parquet(root / "data" / "train-00000-of-00001.parquet")
    return root


def _configs(root: Path) -> Path:
    """A dataset of two configurations, which its card describes."""
    for config in ("en", "fr"):
        _table(root / config / "train-00000-of-00001.parquet", [{"text": f"{config} {row}"} for row in range(20)])
    entries = [f"- config_name: {config}\n  data_files: {config}/*.parquet" for config in ("en", "fr")]
    (root / "README.md").write_text("---\nconfigs:\n" + "\n".join(entries) + "\n---\n# Two languages\n")
    return root


def _script(root: Path) -> Path:
    """A dataset of a Python script, which is no longer run, beside its files."""
    root.mkdir()
    (root / f"{root.name}.py").write_text("raise SystemExit('this must not run')")
    for split in ("train", "test"):
        _table(root / "data" / f"{split}-00000-of-00002.parquet", [{"code": f"{split} {row}"} for row in range(10)])
        _table(root / "data" / f"{split}-00001-of-00002.parquet", [{"code": f"{split} {row}"} for row in range(10, 20)])
    return root


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    root = tmp_path_factory.mktemp("hub")
    lines, table, chats, code, plain = (root / name for name in ("lines", "table", "chats", "code", "plain"))
    for split in ("train", "test"):
        _lines(lines / f"{split}.jsonl", [{"text": f"{split} {row}"} for row in range(30)])
    _table(
        table / "data" / "train-00000-of-00001.parquet",
        [{"id": row, "title": "t", "abstract": f"a{row}"} for row in range(2000)],
    )
    for split, chat in (("train_sft", CHAT), ("test_sft", CHAT[:1])):
        _table(chats / "data" / f"{split}-00000-of-00001.parquet", [{"prompt": "x", "messages": chat}])
    for split in ("train", "validation", "test", "prompt"):
        _table(code / "full" / f"{split}-00000-of-00001.parquet", [{"text": f"Sum? {split}", "code": "a + b"}])
    (code / "README.md").write_text(
        "---\nconfigs:\n- config_name: full\n  data_files:\n"
        + "".join(
            f"  - split: {split}\n    path: full/{split}-*\n" for split in ("train", "validation", "test", "prompt")
        )
        + "- config_name: sanitized\n  data_files: sanitized/*.parquet\n---\n"
    )
    _table(code / "sanitized" / "train-00000-of-00001.parquet", [{"prompt": "Sum?", "code": "a - b"}])
    plain.mkdir()
    (plain / "plain.py").write_text("raise SystemExit('this must not run')")
    datasets = {"org/lines": lines, "org/table": table, "HuggingFaceH4/ultrachat_200k": chats}
    datasets |= {"org/pictured": _pictured(root / "pictured")}
    datasets |= {"org/mine": lines, "org/theirs": lines, "org/configs": _configs(root / "configs")}
    datasets |= {"google-research-datasets/mbpp": code, "org/script": _script(root / "script"), "org/plain": plain}
    with FakeHub(datasets=datasets, tokens={"org/mine": "hf_mine", "org/theirs": "hf_theirs"}) as running:
        yield running


def test_splits_columns_and_streams(hub: FakeHub, tmp_path: Path) -> None:
    whole, streamed, splits, column, mine = read(
        hub.environment(tmp_path, token="hf_mine"),
        "org/lines",
        "org/lines:num=2",
        "org/lines:num=2:split=test+train",
        "org/table:column=abstract:num=1",
        "org/mine",
    )
    assert whole["count"] == streamed["count"] == mine["count"] == 30
    assert whole["ends"] == streamed["ends"] == ["train 0", "train 9"]
    assert whole["first"] != ["train 0", "train 1", "train 2"]
    assert streamed["first"] != ["train 0", "train 1", "train 2"]
    assert whole["origin"] == "hub dataset org/lines, split train"
    assert streamed["origin"] == "hub dataset org/lines, split train, streamed"
    assert splits["count"] == 60
    assert splits["origin"] == "hub dataset org/lines, split test+train, streamed"
    assert column["count"] == 2000
    assert column["ends"] == ["a0", "a999"]


def test_splits_of_well_known_names_are_those_asked_for(hub: FakeHub, tmp_path: Path) -> None:
    test, code, other, both = read(
        hub.environment(tmp_path),
        "ultrachat_200k:split=test_sft",
        "mbpp:split=prompt",
        "mbpp:config=sanitized",
        "ultrachat_200k:split=a+b",
    )
    assert test["origin"] == "hub dataset HuggingFaceH4/ultrachat_200k, split test_sft"
    assert test["first"] == [CHAT[:1]]
    assert code["first"] == [[{"role": "user", "content": "Sum? prompt"}, {"role": "assistant", "content": "a + b"}]]
    assert other["first"] == ["a - b"]
    assert "found no split 'a'; needed one of " in str(both["error"])


def test_configurations_and_well_known_names(hub: FakeHub, tmp_path: Path) -> None:
    french, chats, code, script, held = read(
        hub.environment(tmp_path),
        "org/configs:config=fr",
        "ultrachat_200k",
        "mbpp",
        "org/script",
        "org/script:split=test:num=2",
    )
    assert (french["count"], french["ends"]) == (20, ["fr 0", "fr 9"])
    assert french["origin"] == "hub dataset org/configs, config fr, split train"
    assert (chats["first"], chats["count"]) == ([CHAT], 1)
    assert chats["origin"] == "hub dataset HuggingFaceH4/ultrachat_200k, split train_sft"
    assert code["count"] == 3
    assert code["origin"] == "hub dataset google-research-datasets/mbpp, config full, split train+validation+test"
    pair = [{"role": "user", "content": "Sum? test"}, {"role": "assistant", "content": "a + b"}]
    assert pair in code["first"]
    assert (script["count"], script["ends"]) == (20, ["train 0", "train 9"])
    assert (held["count"], held["ends"]) == (20, ["test 0", "test 9"])


def test_images_stay_bytes_until_they_are_rows(hub: FakeHub, tmp_path: Path) -> None:
    """Their sizes stand for them here; none of them could be opened."""
    whole, streamed = read(hub.environment(tmp_path), "org/pictured", "org/pictured:num=2")
    for found in (whole, streamed):
        rows = [row for _, row in found["first"]]
        assert found["count"] == 6
        assert all(row == [["user", [row[0][1][0], "What?", 2]]] for row in rows)
        assert len({row[0][1][0] for row in rows}) == 3


def test_refusals(hub: FakeHub, tmp_path: Path) -> None:
    says = {
        "org/table": "found keys 'id', 'title', 'abstract'; understood: ",
        "org/lines:split=tset": "found no split 'tset'; needed one of train, test; did you mean 'test'?",
        "org/lines:config=fr": "BuilderConfig 'fr' not found. Available: ['default']); check config= and split=",
        "org/configs": "Config name is missing",
        "org/none": "found no dataset of that name on the hub, or a private one; check the name",
        "pile10k": "did you mean 'pile-10k'?",
        "org/theirs": "found a gated dataset that this login may not read; ask for access",
        "org/plain": "found a Python script, which is not run; needed data files; look for a copy in parquet",
        "org/script:config=a": "found a Python script, which is not run; needed data files; drop config=",
    }
    for (item, text), found in zip(says.items(), read(hub.environment(tmp_path), *says), strict=True):
        assert text in str(found.get("error")), item
        assert "\n" not in str(found["error"])


def test_the_cache_alone(hub: FakeHub, tmp_path: Path) -> None:
    """Asked for, or for want of a network: what was downloaded is read, which is said; what was not is one message."""
    environment = hub.environment(tmp_path)
    (online,) = read(environment, "org/lines")
    assert online["notes"] == []
    with FakeHub() as gone:
        unreachable = {**environment, "HF_ENDPOINT": gone.endpoint}
    ways = [
        ({**environment, "HF_HUB_OFFLINE": "1"}, "no network allowed (offline)"),
        (unreachable, "the hub out of reach"),
    ]
    before = len(hub.requests)
    for way, why in ways:
        cached, test, missing = read(way, "org/lines:num=2", "org/lines:split=test", "org/none")
        assert (cached["first"], cached["count"]) == (online["first"], 30)
        assert cached["origin"] == "hub dataset org/lines, split train, from the cache alone"
        assert cached["notes"] == [f"dataset 'org/lines': found {why}; reads the copy in the cache as it is"]
        assert (test["count"], test["ends"]) == (30, ["test 0", "test 9"])
        assert f"found {why} and no copy in the cache" in str(missing["error"])
        assert "--dataset python-docs or a local file" in str(missing["error"])
    assert len(hub.requests) == before


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("audiocaps", "not on the hub; download its train.csv"),
        ("llava_conv_58k", "images that are not in the set itself; give a dataset that holds its images"),
        ("local", "give the path of the file itself"),
        ("a name", "neither a file of that name nor a hub name"),
    ],
)
def test_names_that_are_no_text(name: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        resolve(name)


def test_names_in_any_case() -> None:
    assert resolve("CCI3-HQ") == resolve("baai/cci3-hq") == resolve("cci3-hq")
    assert resolve("swift/pile-val-backup").repo == "mit-han-lab/pile-val-backup"
    assert resolve("org/Name").repo == "org/Name"
