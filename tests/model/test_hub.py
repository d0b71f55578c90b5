"""Models from a hub, and from its cache when it is out of reach."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.fakehub import FakeHub
from tests.model import tiny

SCRIPT = """
import json, sys
from autoround.errors import ModelError
from autoround.model.load import open_model

def look(name, **options):
    try:
        model = open_model(name, **options)
    except ModelError as error:
        return str(error)
    norm = model.source.read("model.norm.weight").sum().item()
    files = [file.name for file in model.side_files()]
    return {"norm": norm, "ids": model.tokenizer()("a")["input_ids"], "files": files}

print(json.dumps([look(name, **options) for name, options in json.loads(sys.argv[1])]))
"""


def _look(environment: dict[str, str], *wanted: tuple[str, dict[str, Any]]) -> list[Any]:
    """What a new process makes of these models."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(wanted)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 7}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(tmp_path / "model")
    tiny.save("llama", tmp_path / "model", max_shard_size="20KB")
    (tmp_path / "model" / "unwanted.bin").write_bytes(bytes(9))
    return tmp_path / "model"


def test_hub_and_its_cache(folder: Path, tmp_path: Path) -> None:
    original = tiny.make("llama")
    norm = original.model.norm.weight.sum().item()
    with torch.no_grad():
        original.model.norm.weight.mul_(3)
    original.save_pretrained(tmp_path / "tripled")
    (tmp_path / "tripled" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tripled" / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    repositories = {"org/tiny": folder, "org/tiny@tripled": tmp_path / "tripled", "org/private": folder}
    side_files = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    opened = {"norm": pytest.approx(norm, abs=1e-4), "ids": [7], "files": side_files}

    with FakeHub(models=repositories, tokens={"org/private": "hf_secret"}) as hub:
        environment = hub.environment(tmp_path / "home")
        main, tripled, locked, private, absent, revision, path, elsewhere = _look(
            environment,
            ("org/tiny", {}),
            ("org/tiny", {"revision": "tripled"}),
            ("org/private", {}),
            ("org/private", {"token": "hf_secret"}),
            ("org/none", {}),
            ("org/tiny", {"revision": "none"}),
            ("./no/such/folder", {}),
            ("org/tiny", {"cache_dir": str(tmp_path / "elsewhere")}),
        )
        asked = {request.path for request in hub.requests}
    assert main == elsewhere == private == opened
    assert tripled == opened | {"norm": pytest.approx(3 * norm, abs=1e-4)}
    assert "org/private: found no such folder, and no such model on the hub or no access to it" in locked
    assert "org/none: found no such folder, and no such model on the hub" in absent
    assert revision == "org/tiny: found no revision none; needed a branch, tag or commit of it"
    assert "./no/such/folder: found no such folder or file" in path
    assert any("elsewhere" in str(file) for file in tmp_path.glob("elsewhere/models--org--tiny/**/config.json"))
    assert not any("unwanted" in path for path in asked)

    cached, missing = _look(environment, ("org/tiny", {}), ("org/other", {}))
    assert cached == opened
    assert "org/other: found no such folder, no copy in the hub cache and no connection to the hub" in missing


def test_a_model_without_safetensors_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with FakeHub(models={"org/pickled": folder}) as hub:
        (said,) = _look(hub.environment(tmp_path / "home"), ("org/pickled", {}))
    assert said.startswith("org/pickled: found no safetensors; needed model.safetensors or ")
    assert "convert the model with save_pretrained" in said
