"""Scaled rotary positions of GGUF files as sources."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from autoround import hub
from autoround.errors import ModelError
from autoround.formats.gguf.metadata import extra_tensors
from autoround.model.gguf_rope import add_scaled_rope, rope_of
from autoround.model.load import open_model
from tests.formats import gguf_models


@pytest.mark.parametrize("name", ["llama_linear", "llama_3", "qwen3_yarn", "gemma3"])
def test_scaled_rotary_positions_are_read(name: str, tmp_path: Path) -> None:
    """In files of this package, whose configuration transformers reads without them."""
    wide = {"head_dim": 64} if name == "llama_3" else {}  # of fewer pairs the settings do not follow
    original = gguf_models.make(name, **wide)
    gguf_models.write_model(original, tmp_path / "a.gguf")
    found, wanted = rope_of(open_model(tmp_path / "a.gguf").config), rope_of(original.config)
    assert {key: found.get(key) for key in wanted} == pytest.approx(wanted)
    tokens_BT = torch.randint(3, 40, (2, 20))
    with torch.no_grad():
        assert torch.equal(hub.load(tmp_path / "a.gguf")(tokens_BT).logits, original(tokens_BT).logits)


@pytest.mark.parametrize(("low", "high", "original", "factor"), [(1.0, 4.0, 8192, 8.0), (1.0, 4.0, 8192, 32.0)])
def test_settings_of_llama_3_follow_from_its_factors(low: float, high: float, original: int, factor: float) -> None:
    wanted = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
              "original_max_position_embeddings": original}  # fmt: skip
    settings: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 2, "max_position_embeddings": 131072}
    config = LlamaConfig(**settings, rope_parameters=wanted | {"rope_theta": 5e5})
    plain = LlamaConfig(**settings, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    factors = SimpleNamespace(data=extra_tensors(config)["rope_freqs.weight"].numpy())
    add_scaled_rope(plain, {}, {"rope_freqs.weight": factors}, "a.gguf")
    assert rope_of(plain) == wanted | {"rope_theta": 5e5}
    odd = SimpleNamespace(data=factors.data[::-1])
    other = LlamaConfig(**settings, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(ModelError, match=r"a\.gguf: found rotary positions scaled by rope_freqs\.weight; needed those"):
        add_scaled_rope(other, {}, {"rope_freqs.weight": odd}, "a.gguf")
