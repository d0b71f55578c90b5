"""Runs in a client environment: what llama.cpp computes from GGUF files, as JSON on the last line.

Usage: complete_gguf.py REQUEST; REQUEST is JSON: {"files": {name: {"path": file, "prompt": [token, …] or text,
"new_tokens": n, "top": n, "texts": [text, …]}}}; all but the path may be left out.

Answer: name -> {"tokens": [token, …] of the prompt and the greedy ones after it, "logprobs": for every beginning of
them [[token, logarithm of its probability], …] of the likeliest ``top`` tokens, "texts": [[token, …], …] without BOS
and EOS, "bounded": [[token, …], …] with them}, or {"error": text}.
"""

import json
import sys
import traceback
import urllib.request
from typing import Any

import xllamacpp


def serve(path: str) -> xllamacpp.Server:
    """A server of one file on two threads of the CPU."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 512, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.warmup = params.fit_params = False
    return xllamacpp.Server(params)


def post(server: xllamacpp.Server, what: str, body: dict[str, Any]) -> dict[str, Any]:
    """Ask a server."""
    header = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.listening_address}/{what}", json.dumps(body).encode(), header)
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def tokenize(server: xllamacpp.Server, text: str, bounded: bool) -> list[int]:
    """Tokens of a text in which special tokens count."""
    return post(server, "tokenize", {"content": text, "add_special": bounded, "parse_special": True})["tokens"]


def likeliest(server: xllamacpp.Server, tokens: list[int], top: int) -> list[tuple[int, float]]:
    """The tokens that may follow, the likeliest first."""
    body = {"prompt": tokens, "n_predict": 1, "n_probs": top, "temperature": 0}
    (found,) = post(server, "completion", body)["completion_probabilities"]
    return [(one["id"], one["logprob"]) for one in found["top_logprobs"]]


def compute(
    path: str, prompt: list[int] | str = "", new_tokens: int = 0, top: int = 1, texts: tuple[str, ...] = ()
) -> dict[str, Any]:
    """What the answer holds for a file; token by token, so that no end token stops it."""
    server = serve(path)
    tokens = tokenize(server, prompt, True) if isinstance(prompt, str) else list(prompt)
    length, logprobs = len(tokens) + new_tokens, []
    while tokens and len(logprobs) < length:
        logprobs.append(likeliest(server, tokens[: len(logprobs) + 1], top))
        if len(logprobs) == len(tokens) < length:
            tokens.append(logprobs[-1][0][0])
    without, bounded = ([tokenize(server, text, both) for text in texts] for both in (False, True))
    return {"tokens": tokens, "logprobs": logprobs, "texts": without, "bounded": bounded}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What ``compute`` finds, or the error of the client."""
    try:
        return compute(**request)
    except Exception:  # noqa: BLE001  whatever it is, it is the answer
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    print(json.dumps({name: answer(one) for name, one in json.loads(sys.argv[1])["files"].items()}))
