"""Writing and reading back need memory for pieces of tensors and for the codes of a block, not for a file."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from autoround.backends.cpu import CPU
from tests.formats.quantized import quantized

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def _anonymous_bytes() -> int:
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024


def _peak_bytes(action: Callable[[], object]) -> int:
    """How much memory that no file backs is in use during an action, at most and beyond what was."""
    CPU.release_memory()
    before, peak, done = _anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        action()
    finally:
        done.set()
        watcher.join()
    return peak - before


@pytest.mark.parametrize("form", ["auto_gptq", "auto_awq"])
def test_neither_a_file_nor_a_tensor_is_held(form: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=2**15, hidden_size=512, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4)  # fmt: skip
    tiny = quantized(LlamaForCausalLM(config).eval(), form, group_size=64)
    assert len(tiny.blocks) == config.num_hidden_layers
    peak = _peak_bytes(lambda: tiny.write(form, tmp_path / "out"))
    embedding = 2 * config.vocab_size * config.hidden_size
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 2 * embedding
    assert peak < 1.5 * embedding  # 0.3 to 0.8 when this was written; 4 to 5 with a writer that collects tensors
