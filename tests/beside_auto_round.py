"""Both packages in one process: ``python -m tests.beside_auto_round SITE FIRST OUT`` prints where layers are from.

SITE is the site-packages folder where auto_round is, FIRST the package to import first, OUT an empty folder.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.data.words import make_tokenizer
from tests.engine import small

SETTINGS: dict[str, Any] = {
    "bits": 4, "group_size": 32, "iters": 1, "nsamples": small.ROWS, "seqlen": small.TOKENS, "batch_size": 4,
    "device_map": "cpu", "enable_torch_compile": False,
}  # fmt: skip


def main(site: str, first: str, out: Path) -> dict[str, str]:
    """Quantize with both and load both results in two ways; the package of a quantized layer for each."""
    sys.path.append(site)
    modules = {name: importlib.import_module(name) for name in sorted(("autoround", "auto_round"), key=first.__ne__)}
    autoround, auto_round = modules["autoround"], modules["auto_round"]
    torch.set_num_threads(1)
    tokenizer, rows = make_tokenizer(), torch.tensor(small.rows())
    folders = {}
    for package, dataset in ((autoround, rows), (auto_round, [row[None] for row in rows])):
        model = small.make(vocab_size=len(tokenizer))
        rounded = package.AutoRound(model, tokenizer, dataset=dataset, **SETTINGS)
        _, folders[package.__name__] = rounded.quantize_and_save(str(out / package.__name__), format="auto_round")
    found = {f"autoround.load of {name}": _home(autoround.load(folder)) for name, folder in folders.items()}
    for name, folder in folders.items():
        found[f"transformers' of {name}"] = _home(AutoModelForCausalLM.from_pretrained(folder, device_map="cpu"))
    return found


def _home(model: torch.nn.Module) -> str:
    """The package that a quantized layer's class is from."""
    return type(model.get_submodule("model.layers.0.mlp.up_proj")).__module__.partition(".")[0]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
