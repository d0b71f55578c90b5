"""Runs in the client environment: load folders with auto-round's own loader, print logits and greedy tokens as JSON.

Usage: load_with_auto_round.py REQUEST, where REQUEST is JSON: {"prompts": {folder: [token, …]}, "new_tokens": n}.
"""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoRoundConfig


def answer(folder: str, prompt: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """Greedy tokens, logits of all of them, and which module computes each packed layer."""
    # The explicit configuration makes the client read GPTQ folders too, which are another package's otherwise.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", quantization_config=AutoRoundConfig())
    tokens = model.generate(prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        logits = model(tokens).logits.float()
    layers = {path: type(module).__module__ for path, module in model.named_modules() if hasattr(module, "qweight")}
    return {"tokens": tokens[0].tolist(), "logits": logits[0].tolist(), "layers": layers}


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    new_tokens = request["new_tokens"]
    answers = {
        folder: answer(folder, torch.tensor([prompt]), new_tokens) for folder, prompt in request["prompts"].items()
    }
    print(json.dumps(answers))
