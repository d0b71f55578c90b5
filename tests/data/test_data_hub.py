"""Hub datasets through the real client libraries against a local hub, each case in its own process."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.fakehub import FakeHub

REPO = Path(__file__).parents[2]
READ = """
import json, random, sys
from autoround.data.language import parse_specs
from autoround.data.sources import documents
from autoround.errors import DataError
for text in sys.argv[1:]:
    spec, = parse_specs(text)
    try:
        found = list(documents(spec, rng=random.Random(1), rows=2))
        ends = [min(map(str, found)), max(map(str, found))]
        print(json.dumps({"first": found[:3], "count": len(found), "ends": ends}))
    except DataError as error:
        print(json.dumps({"error": str(error)}))
"""
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def read(environment: dict[str, str], *items: str) -> list[dict[str, object]]:
    """The documents, or the error, of every item."""
    done = subprocess.run(
        [sys.executable, "-c", READ, *items], env=environment, cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    root = tmp_path_factory.mktemp("hub")
    lines, table, chats = root / "lines", root / "table", root / "chats"
    for folder in (lines, table / "data", chats / "data"):
        folder.mkdir(parents=True)
    for split in ("train", "test"):
        (lines / f"{split}.jsonl").write_text("".join(json.dumps({"text": f"{split} {i}"}) + "\n" for i in range(30)))
    column = {"id": list(range(2000)), "title": ["t"] * 2000, "abstract": [f"a{index}" for index in range(2000)]}
    pyarrow.parquet.write_table(pa.table(column), table / "data" / "train-00000-of-00001.parquet")
    for split in ("train_sft", "test_sft"):
        rows = [{"prompt": "x", "messages": CHAT}]
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), chats / "data" / f"{split}-00000-of-00001.parquet")
    datasets = {"org/lines": lines, "org/table": table, "HuggingFaceH4/ultrachat_200k": chats}
    datasets |= {"org/mine": lines, "org/theirs": lines}
    with FakeHub(datasets=datasets, tokens={"org/mine": "hf_mine", "org/theirs": "hf_theirs"}) as running:
        yield running


def test_datasets_of_the_hub_and_of_its_cache_offline(hub: FakeHub, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path, token="hf_mine")
    whole, streamed, splits, column, chats, mine, *errors = read(
        environment,
        "org/lines",
        "org/lines:num=2",
        "org/lines:num=2:split=test+train",
        "org/table:column=abstract:num=1",
        "ultrachat_200k",
        "org/mine",
        "org/table",
        "org/lines:split=tset",
        "org/lines:config=fr",
        "org/none",
        "pile10k",
        "org/theirs",
    )
    assert whole["count"] == streamed["count"] == mine["count"] == 30
    assert whole["first"] != ["train 0", "train 1", "train 2"]
    assert streamed["first"] != ["train 0", "train 1", "train 2"]
    assert splits["count"] == 60
    assert column["count"] == 2000
    assert column["ends"] == ["a0", "a999"]
    assert chats == {"first": [CHAT], "count": 1, "ends": [str(CHAT)] * 2}
    for found, says in zip(
        errors,
        (
            "found keys 'id', 'title', 'abstract'",
            "found no split 'tset'; needed one of train, test; did you mean 'test'?",
            "BuilderConfig 'fr' not found. Available: ['default']); check config= and split=",
            "found no dataset of that name on the hub",
            "did you mean 'pile-10k'?",
            "found a gated dataset that this login may not read; ask for access",
        ),
        strict=True,
    ):
        assert says in str(found["error"])

    cached, missing = read({**environment, "HF_HUB_OFFLINE": "1"}, "org/mine:num=2", "org/none")
    assert cached["count"] == 30
    assert "--dataset python-docs or a local file" in str(missing["error"])


def test_a_hub_out_of_reach(tmp_path: Path) -> None:
    with FakeHub() as gone:
        environment = gone.environment(tmp_path)
    (found,) = read(environment, "pile-10k")
    assert "found the hub out of reach" in str(found["error"])
    assert "--dataset python-docs or a local file" in str(found["error"])
