"""How checkpoints store their layers, by what their configuration says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoround.errors import FormatError
from autoround.formats.stored import stored
from autoround.hub import load
from tests.model.tiny import save


def test_columns_out_of_order_are_refused_by_the_config() -> None:
    def config(order: str | None) -> dict[str, Any]:
        weights = {"num_bits": 4, "group_size": 32, "actorder": order}
        return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}

    for order in (None, "static", "weight"):
        assert stored(config(order), "folder").group_sizes == {32}
    with pytest.raises(FormatError, match="folder: found actorder 'group'; needed columns in order"):
        stored(config("group"), "folder")


def test_layers_that_cannot_compute_packed_are_named(tmp_path: Path) -> None:
    save("llama", tmp_path)
    name, file = "model.layers.0.self_attn.k_proj", tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{name}.weight"]
    tensors[f"{name}.weight_packed"] = torch.zeros(16, 4, dtype=torch.int32)
    tensors[f"{name}.weight_scale"] = torch.ones(16, 1)
    tensors[f"{name}.weight_shape"] = torch.tensor([16, 32])
    save_file(tensors, file, {"format": "pt"})
    quantized = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"quantization_config": quantized}))
    with pytest.raises(FormatError, match=f"^{re.escape(name)}: found 16x32 weights; needed multiples of 32"):
        load(tmp_path)
