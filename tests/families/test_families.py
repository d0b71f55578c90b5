"""Every family of the table through every contract, or refused with the words that the table has."""

from pathlib import Path

import pytest
import torch

from autoround.errors import AutoRoundError
from autoround.evaluate.scores import compare
from autoround.evaluate.stream import Rows, Streaming, compare_streamed
from autoround.model.load import open_model
from tests.families import contracts, page
from tests.families.table import FAMILIES, make

# One of each kind: the rest takes longer than the fast tests may.
QUICK = (
    "llama", "gemma2", "gpt2", "gptj", "bloom", "cohere2", "minicpm3", "xglm", "modernbert-decoder", "qwen3_next",
    "nemotron_h", "mamba", "zamba2", "rwkv", "xlstm", "qwen3_vl", "gemma3", "mllama",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_family(name: str, tmp_path: Path) -> None:
    if refused := FAMILIES[name].refused:
        with pytest.raises(AutoRoundError, match=refused):
            contracts.quantized(name, tmp_path)
    else:
        contracts.check_all(contracts.quantized(name, tmp_path))


@pytest.mark.parametrize("name", ["bamba", "gemma3n_text", "gemma4_text", "recurrent_gemma", "qwen2_vl"])
def test_scores_block_by_block_are_the_models(name: str) -> None:
    """Blocks that return two items or carry state; several streams of hidden states."""
    model, (tokens_NT, valid_NT) = make(name), contracts.rows()
    expected = compare(model, {}, tokens_NT)["float"]
    found = compare_streamed(open_model(model), {}, Rows(tokens_NT, valid_NT), streaming=Streaming(batch_size=3))
    torch.testing.assert_close(found["float"].scores.nll_P, expected.nll_P, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.kind == "vision"])
def test_models_in_memory_are_written_under_the_names_of_checkpoints(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    stored, own = open_model(tmp_path).source, open_model(model).source
    assert {key: own.checkpoint_name(key) for key in own.names()} == {
        key: stored.checkpoint_name(key) for key in own.names()
    }


def test_the_page_has_every_family() -> None:
    written = page.PAGE.read_text()
    listed = [line.split("`")[1] for line in written.splitlines() if line.startswith("| `")]
    assert sorted(listed) == sorted(FAMILIES)
    refused = {line.split("`")[1] for line in written.splitlines() if line.startswith("| `") and "| no:" in line}
    assert refused == {name for name, family in FAMILIES.items() if family.refused}
