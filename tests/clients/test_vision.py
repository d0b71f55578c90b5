"""The loaders of other projects read our folders of models that see images, and compute the same."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from autoround.engine import quantize
from autoround.formats.packed import PackedLinear
from autoround.hub import load
from autoround.recipe import Recipe
from tests.clients.environments import client_python
from tests.families.table import make

pytestmark = [pytest.mark.clients, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("load_folders.py")
ENVIRONMENT = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
FAMILIES = ("qwen2_vl", "llava", "gemma3", "mistral3", "idefics3")
# Format -> loader, environment, and where modules that hold packed layers come from.
CLIENTS = {
    "auto_round": ("auto_round", "auto-round", "auto_round_extension.torch.qlinear_torch_zp"),
    "auto_gptq": ("transformers", "gptqmodel", "gptqmodel.nn_modules.qlinear."),
    "auto_awq": ("transformers", "gptqmodel", "gptqmodel.nn_modules.qlinear."),
    "llm_compressor": ("transformers", "auto-round", "torch.nn.modules.linear"),
}
ROWS_NT = torch.arange(4, 84).view(4, 20)
# They compute in float16.
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Format -> family -> folder."""
    found: dict[str, dict[str, Path]] = {form: {} for form in CLIENTS}
    for name in FAMILIES:
        root = tmp_path_factory.mktemp(name)
        make(name).save_pretrained(root / "source")
        recipe = Recipe.preset(
            "rtn", bits=4, group_size=32, format=tuple(CLIENTS), output_dir=str(root / "out"), device_map="cpu"
        )
        for form, folder in zip(CLIENTS, quantize(str(root / "source"), recipe).export(), strict=True):
            found[form][name] = folder
    return found


@pytest.mark.parametrize("form", CLIENTS)
def test_the_client_computes_the_same(form: str, folders: dict[str, dict[str, Path]]) -> None:
    loader, environment, backend = CLIENTS[form]
    python = client_python(environment)
    assert python.exists(), f"found no {python}; run: python tests/clients/environments.py"
    rows = {str(folder): ROWS_NT.tolist() for folder in folders[form].values()}
    request = json.dumps({"loader": loader, "prompts": rows, "rows": rows, "new_tokens": 1})
    done = subprocess.run([python, SCRIPT, request], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for name, folder in folders[form].items():
        answer, model = answers[str(folder)], load(folder, dtype="float32")
        assert "error" not in answer, f"{name}: {answer['error']}"
        packed = {path for path, module in model.named_modules() if isinstance(module, PackedLinear)}
        assert set(answer["layers"]) == packed, name
        assert all(module.startswith(backend) for module in answer["layers"].values()), name
        with torch.no_grad():
            every_NTV = model(ROWS_NT, use_cache=False).logits[:, :-1].log_softmax(-1)
        ours_NT = every_NTV.gather(-1, ROWS_NT[:, 1:, None])[..., 0]
        torch.testing.assert_close(torch.tensor(answer["log_probabilities"]), ours_NT, rtol=0, atol=TOLERANCE)
