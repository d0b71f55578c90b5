"""Runs in the environment of vLLM: load folders on the CPU, print greedy tokens and log-probabilities as JSON.

Usage: generate_vllm.py REQUEST; REQUEST is JSON: {"prompts": {folder: [[token, …], …]}, "rows": {folder: [[token, …],
…]}, "new_tokens": n}. Prompts are continued; of rows, the log-probability of every token but the first is told.
"""

import gc
import json
import os
import sys
import traceback
from typing import Any

# Models one after another need the engine in this process. A gibibyte of cache holds what is asked here.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}

import torch
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

# Of a layer that stays packed, in the layouts that vLLM reads.
PACKED = ("qweight", "weight_packed")


def answer(folder: str, prompts: list[list[int]], rows: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """What ``compute`` finds, or the error of vLLM; what it leaves behind is cleared for the next folder."""
    try:
        return compute(folder, prompts, rows, new_tokens)
    except Exception:  # noqa: BLE001  whatever it is, it is the answer
        return {"error": traceback.format_exc()}
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


def compute(folder: str, prompts: list[list[int]], rows: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Whole sequences of tokens, log-probabilities of the rows, and which method computes each packed layer."""
    longest = max(*map(len, rows), max(map(len, prompts)) + new_tokens) + 1
    sizes = {"max_model_len": longest, "max_num_batched_tokens": 1024}
    llm = LLM(folder, dtype="float16", enforce_eager=True, enable_prefix_caching=False, **sizes)
    greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    # It generates at least one token; none is needed here.
    score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    continued = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    scored = llm.generate([{"prompt_token_ids": row} for row in rows], score, use_tqdm=False)
    return {
        "tokens": [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in continued],
        "log_probabilities": [
            [found[token].logprob for token, found in zip(row[1:], output.prompt_logprobs[1:], strict=True)]
            for row, output in zip(rows, scored, strict=True)
        ],
        "layers": llm.apply_model(packed_layers)[0],
    }


def packed_layers(model: torch.nn.Module) -> dict[str, str]:
    """Path -> method of every layer whose weight is in integers."""
    return {
        path: type(module.quant_method).__name__
        for path, module in model.named_modules()
        if any(getattr(module, name, None) is not None for name in PACKED)
    }


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    answers = {
        folder: answer(folder, prompts, request["rows"][folder], request["new_tokens"])
        for folder, prompts in request["prompts"].items()
    }
    print(json.dumps(answers))
