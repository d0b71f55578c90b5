"""The fake hub against the real client libraries; the ``datasets`` library has its turn in data/test_data_hub.py."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tests.fakehub import FakeHub

CLIENTS = """
import json, sys
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from pathlib import Path
from transformers import AutoConfig, AutoTokenizer

def refusal(call, *args, **options):
    try:
        call(*args, **options)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        return type(error).__name__

folder = Path(snapshot_download("org/model"))
info = HfApi().model_info("org/model", files_metadata=True)
print(json.dumps({
    "hidden": [AutoConfig.from_pretrained("org/model", revision=name).hidden_size for name in ("main", "wide")],
    "ids": AutoTokenizer.from_pretrained("org/model")("a b")["input_ids"],
    "files": sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
    "weights": (folder / "model.safetensors").read_bytes().hex(),
    "siblings": sorted(file.rfilename for file in info.siblings),
    "pinned": hf_hub_download("org/model", "config.json", revision=info.sha) == str(folder / "config.json"),
    "refs": sorted(ref.name for ref in HfApi().list_repo_refs("org/model").branches),
    "paths": [entry.path for entry in HfApi().get_paths_info("org/model", ["deep/er", "config.json"])],
    "refusals": [
        refusal(hf_hub_download, "org/none", "config.json"),
        refusal(hf_hub_download, "org/model", "none.json"),
        refusal(hf_hub_download, "org/model", "config.json", revision="none"),
        refusal(hf_hub_download, "org/private", "config.json"),
        refusal(hf_hub_download, "org/private", "config.json", token="hf_secret"),
    ],
    "dataset": Path(hf_hub_download("org/lines", "train.jsonl", repo_type="dataset")).read_text(),
}))
"""


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A model in two widths, and a dataset."""
    made = {name: tmp_path / name for name in ("model", "wide", "lines")}
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a b": 1}, unk_token="<unk>"))
    for name, width in (("model", 8), ("wide", 16)):
        LlamaConfig(hidden_size=width, num_attention_heads=2, num_hidden_layers=1).save_pretrained(made[name])
        PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(made[name])
    (made["model"] / "model.safetensors").write_bytes(bytes(range(100)))
    (made["model"] / "deep" / "er").mkdir(parents=True)
    (made["model"] / "deep" / "er" / "code.py").write_text("x = 1\n")
    made["lines"].mkdir()
    (made["lines"] / "train.jsonl").write_text('{"text": "x"}\n')
    return made


def test_real_clients(folders: dict[str, Path], tmp_path: Path) -> None:
    with FakeHub(
        models={"org/model": folders["model"], "org/model@wide": folders["wide"], "org/private": folders["model"]},
        datasets={"org/lines": folders["lines"]},
        tokens={"org/private": "hf_secret"},
    ) as hub:
        done = subprocess.run(
            [sys.executable, "-c", CLIENTS],
            env=hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert {request.method for request in hub.requests if request.path.endswith("/config.json")} == {"HEAD", "GET"}
        assert all(request.status < 500 for request in hub.requests)
    files = sorted(
        path.relative_to(folders["model"]).as_posix() for path in folders["model"].rglob("*") if path.is_file()
    )
    assert json.loads(done.stdout) == {
        "hidden": [8, 16],
        "ids": [1],
        "files": files,
        "weights": bytes(range(100)).hex(),
        "siblings": files,
        "pinned": True,
        "refs": ["main", "wide"],
        "paths": ["config.json", "deep/er"],
        "refusals": [
            "RepositoryNotFoundError", "RemoteEntryNotFoundError", "RevisionNotFoundError", "GatedRepoError", None,
        ],
        "dataset": '{"text": "x"}\n',
    }  # fmt: skip


def test_ranges(folders: dict[str, Path]) -> None:
    content = bytes(range(100))
    with FakeHub(models={"org/model": folders["model"]}) as hub:

        def get(asked: str) -> tuple[int, bytes]:
            url = f"{hub.endpoint}/org/model/resolve/main/model.safetensors"
            with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": asked})) as response:
                return response.status, response.read()

        assert get("bytes=10-19") == (206, content[10:20])
        assert get("bytes=90-") == (206, content[90:])
        assert get("bytes=-5") == (206, content[95:])
        assert get("bytes=90-1000") == (206, content[90:])
        assert get("") == (200, content)
        with pytest.raises(urllib.error.HTTPError, match="416"):
            get("bytes=100-")


def test_a_missing_folder_is_noticed_at_once(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError):
        FakeHub(models={"org/model": tmp_path / "none"})
