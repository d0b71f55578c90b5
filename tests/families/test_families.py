"""Every family of the table through every contract, or refused with the words that the table has."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import autoround
from autoround.engine import quantize
from autoround.errors import AutoRoundError
from autoround.evaluate.scores import compare
from autoround.evaluate.stream import Rows, Streaming, compare_streamed
from autoround.model.load import open_model
from autoround.model.media import NO_MEDIA
from autoround.model.source import WEIGHTS
from autoround.recipe import Recipe
from tests.families import contracts, page
from tests.families.table import FAMILIES, TOKENS, make

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


def test_rwkv_of_many_blocks_is_tuned_and_written_without_halving(tmp_path: Path) -> None:
    """Every sixth block as it comes, here every block."""
    rows, plain, halving = contracts.rows(), make("rwkv"), make("rwkv")
    halving.config.rescale_every = 1
    halving.save_pretrained(tmp_path / "float")
    own = contracts.Rows(*rows, NO_MEDIA)
    torch.testing.assert_close(contracts.logits(halving, own), contracts.logits(plain, own), rtol=1e-3, atol=1e-3)
    assert halving.rwkv.layers_are_rescaled
    run = quantize(
        str(tmp_path / "float"),
        Recipe(bits=4, group_size=32, iters=2, nsamples=4, batch_size=4, seqlen=TOKENS, dataset=rows[0].tolist(),
               output_dir=str(tmp_path / "out"), device_map="cpu", torch_compile=False),
    )  # fmt: skip
    for _ in run:
        pass
    (folder,) = run.export()
    expected = contracts.logits(contracts.dequantized(plain, run), own)
    loaded = autoround.load(folder, dtype=torch.float32)
    torch.testing.assert_close(contracts.logits(loaded, own), expected, rtol=1e-3, atol=1e-3)
    assert loaded.config.rescale_every == 0


def test_stacks_are_read_whichever_way_they_lie(tmp_path: Path) -> None:
    """Checkpoints of Qwen3-VL's mixtures hold inputs first; transformers turns what does not fit."""
    model = make("qwen3_vl_moe")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    turned = [key for key in stored if key.endswith("experts.down_proj")]
    assert len(turned) == 2
    save_file(stored | {key: stored[key].mT.contiguous() for key in turned}, tmp_path / WEIGHTS)
    loaded, source = type(model).from_pretrained(tmp_path, dtype=torch.float32), open_model(tmp_path).source
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert torch.equal(source.read(name), tensor), name
        assert source.shape(name) == tuple(tensor.shape)


def test_the_page_has_every_family() -> None:
    written = page.PAGE.read_text()
    listed = [line.split("`")[1] for line in written.splitlines() if line.startswith("| `")]
    assert sorted(listed) == sorted(FAMILIES)
    refused = {line.split("`")[1] for line in written.splitlines() if line.startswith("| `") and "| no:" in line}
    assert refused == {name for name, family in FAMILIES.items() if family.refused}
