"""Runs in a client environment: load folders with another project's loader, print logits and greedy tokens as JSON.

Usage: load_folders.py REQUEST; REQUEST is JSON: {"loader": name, "prompts": {folder: [token, …]}, "new_tokens": n}.
With "rows": {folder: [[token, …], …]} the prompts of a folder are whole sequences of one length. The answer then holds
the sequences with the last n tokens as this client would choose each after those before it, in one pass where
generating takes n, and the log-probability of every token of the rows but the first.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

# By which of their tensors packed layers are known.
PACKED = ("qweight", "weight_packed")


def load(folder: str, loader: str) -> Any:
    """A folder as this loader's users load it."""
    sees = "vision_config" in json.loads((Path(folder) / "config.json").read_text())
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    if loader == "auto_round":
        from transformers import AutoRoundConfig

        # The explicit configuration makes it read GPTQ folders too, which are another package's otherwise.
        return kind.from_pretrained(folder, dtype="auto", quantization_config=AutoRoundConfig())
    if loader == "gptqmodel":
        from gptqmodel import GPTQModel

        return GPTQModel.load(folder, device="cpu", dtype=torch.float16).model
    if loader == "compressed_tensors":
        return decompressed(Path(folder))
    return kind.from_pretrained(folder, dtype="auto")


def decompressed(folder: Path) -> Any:
    """A dense model with the weights that the library compressed-tensors reads from a folder's packed layers."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = json.loads((folder / "config.json").read_text())
    groups = config.pop("quantization_config")["config_groups"].values()
    tensors = load_file(folder / "model.safetensors")
    for layer in [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]:
        own = {name.rpartition(".")[2]: tensors.pop(name) for name in list(tensors) if name.startswith(f"{layer}.")}
        (group,) = [group for group in groups if "Linear" in group["targets"] or layer in group["targets"]]
        weights = PackedQuantizationCompressor.decompress(own, QuantizationScheme(**group))
        tensors |= {f"{layer}.{name}": weights[name] for name in ("weight", "bias") if name in weights}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    model.load_state_dict(tensors)
    return model.eval()


def answer(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """What ``compute`` or ``measure`` finds, or the error of the client."""
    prompts, new_tokens = request["prompts"][folder], request["new_tokens"]
    try:
        model = load(folder, request["loader"])
        if "rows" in request:
            return measure(model, torch.tensor(prompts), torch.tensor(request["rows"][folder]), new_tokens)
        return compute(model, torch.tensor([prompts]), new_tokens)
    except Exception:  # noqa: BLE001  whatever it is, it is the answer
        return {"error": traceback.format_exc()}


def compute(model: Any, prompt: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """Greedy tokens, logits of all of them, and which module computes each packed layer."""
    layers, tokens = packed_layers(model), generate(model, prompt, new_tokens)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits.float()
    return {"tokens": tokens[0].tolist(), "logits": logits[0].tolist(), "layers": layers}


def measure(model: Any, sequences: torch.Tensor, rows: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """Greedy choices, log-probabilities of every token of the rows but the first, and packed layers as ``compute``."""
    layers = packed_layers(model)
    with torch.no_grad():
        chosen = model(input_ids=sequences, use_cache=False).logits[:, -new_tokens - 1 : -1].argmax(-1)
        every = model(input_ids=rows, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return {
        "tokens": torch.cat((sequences[:, :-new_tokens], chosen), dim=1).tolist(),
        "log_probabilities": every.gather(-1, rows[:, 1:, None])[..., 0].tolist(),
        "layers": layers,
    }


def packed_layers(model: Any) -> dict[str, str]:
    """Path -> where the module of a packed layer comes from."""
    modules = model.named_modules()
    return {path: type(module).__module__ for path, module in modules if any(hasattr(module, name) for name in PACKED)}


def generate(model: Any, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Prompts with their greedy continuations."""
    return model.generate(
        input_ids=prompts, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(json.dumps({folder: answer(folder, request) for folder in request["prompts"]}))
