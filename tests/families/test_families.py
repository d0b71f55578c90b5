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
    "nemotron_h", "mamba", "zamba2", "rwkv", "xlstm",
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


@pytest.mark.parametrize("name", ["bamba", "gemma3n_text", "gemma4_text", "recurrent_gemma"])
def test_scores_block_by_block_are_the_models(name: str) -> None:
    """Blocks that return two items or carry state; several streams of hidden states."""
    model, (tokens_NT, valid_NT) = make(name), contracts.rows()
    expected = compare(model, {}, tokens_NT)["float"]
    found = compare_streamed(open_model(model), {}, Rows(tokens_NT, valid_NT), streaming=Streaming(batch_size=3))
    torch.testing.assert_close(found["float"].scores.nll_P, expected.nll_P, rtol=0, atol=1e-4)


def test_the_page_has_every_family() -> None:
    written = page.PAGE.read_text()
    listed = [line.split("`")[1] for line in written.splitlines() if line.startswith("| `")]
    assert sorted(listed) == sorted(FAMILIES)
    refused = {line.split("`")[1] for line in written.splitlines() if line.startswith("| `") and "| no:" in line}
    assert refused == {name for name, family in FAMILIES.items() if family.refused}
