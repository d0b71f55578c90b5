"""Tokenizers without their models."""

import subprocess
import sys
from pathlib import Path

import pytest

from autoround.errors import ModelError
from autoround.model.tokenizer import open_tokenizer
from tests.data.words import make_tokenizer
from tests.fakehub import FakeHub
from tests.model.tiny import make

ROOT = Path(__file__).parents[2]
OPEN = "from autoround.model.tokenizer import open_tokenizer; print(open_tokenizer('org/m')('w1 w2').input_ids)"


def test_a_folder(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    assert open_tokenizer(str(tmp_path))("w1 w2").input_ids == make_tokenizer()("w1 w2").input_ids


def test_no_weight_of_a_hub_model_is_downloaded(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make("llama").save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    with FakeHub(models={"org/m": source}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", OPEN],
            env=hub.environment(tmp_path / "home"),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        asked = [request.path for request in hub.requests]
    assert (done.returncode, done.stdout) == (0, f"{make_tokenizer()('w1 w2').input_ids}\n"), done.stderr
    assert any(path.endswith("tokenizer.json") for path in asked)
    assert not any(path.endswith(".safetensors") for path in asked)


def test_none_that_loads(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for name, says in ((tmp_path, "found no tokenizer that loads"), (tmp_path / "m.gguf", "found no such file")):
        with pytest.raises(ModelError, match=says) as found:
            open_tokenizer(str(name))
        assert "\n" not in str(found.value)
