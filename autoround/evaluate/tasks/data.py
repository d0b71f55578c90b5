"""What lm-eval calls for the examples of the tasks in this folder."""

import json
from pathlib import Path

from datasets import Dataset  # type: ignore[import-untyped]


def load(*, name: str, **metadata: object) -> dict[str, Dataset]:
    """The examples of a task by its short name; lm-eval also passes the task's metadata, which say nothing here."""
    del metadata
    lines = (Path(__file__).parent / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
