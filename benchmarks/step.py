"""Time of one tuning step beside that of its own matrix products alone: how near the step is to the machine's limit.

A Llama block of SmolLM2's or of Llama 3 8B's widths with random weights, tuned as the engine does: fused layers,
compiled step, compute dtype of the backend. The bound is the products of the block's linear layers, forward and
backward, timed alone in that dtype: outputs, gradients of weights, and gradients of inputs except those of the layers
that read the block's own input. Rounds alternate between step, bound and one large square product.

``python -m benchmarks.step [--like MODEL] [--bits N] [--group-size N] [--batch N] [--seqlen N] [--seconds N]
[--mode eager|compiled|autotuned|graph] [--dtype DTYPE] [--mkl] [--attention eager|sdpa] [--json FILE]``

Modes beside the engine's: ``autotuned`` lets the compiler try variants of kernels and products, ``graph`` records the
compiled step as a CUDA graph and replays it.

Legend: B rows, T tokens in a row, O output features, I input features, D hidden size.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from autoround import func
from autoround.backends.base import Backend, jit, select
from autoround.backends.products import float32_products
from autoround.model.blocks import find_blocks
from autoround.model.capture import capture
from autoround.model.load import open_model
from autoround.model.read import read_block
from benchmarks import machine

WIDTHS = {
    "smollm2": (576, 1536, 9, 3),
    "llama-3-8b": (4096, 14336, 32, 8),
}
"""Hidden and intermediate size, heads, and heads of keys and values."""
MODES = ("eager", "compiled", "autotuned", "graph")
SQUARE = 2048
WARM_UP = 3


def make_block(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype, attention: str
) -> tuple[func.BlockFn, dict[str, Tensor], func.Batch, dict[str, func.QuantSpec]]:
    """A block, its tensors, one batch, and a spec for each of its linear layers."""
    torch.manual_seed(0)
    hidden, intermediate, heads, groups = WIDTHS[options.like]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads, num_key_value_heads=groups,
        num_hidden_layers=1, vocab_size=1024, attn_implementation=attention)  # fmt: skip
    model = open_model(LlamaForCausalLM(config), attn_implementation=attention)
    (path,) = find_blocks(model.skeleton)
    tokens_BT = torch.randint(0, 1024, (options.batch, options.seqlen))
    valid_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    hidden_BTD, (template,) = capture(model, tokens_BT, valid_BT, batch_size=options.batch, device=device, dtype=dtype)
    call = template.bind(hidden_BTD.to(device), torch.arange(options.batch))
    block_fn = func.make_block_fn(model.skeleton.get_submodule(path))
    tensors = read_block(model, path, device=device)
    with torch.no_grad():
        target_BTD = block_fn({name: tensor.to(dtype) for name, tensor in tensors.items()}, call)
    spec = func.QuantSpec(bits=options.bits, group_size=options.group_size)
    specs = dict.fromkeys(func.linear_paths(block_fn.skeleton), spec)
    return block_fn, tensors, func.Batch(call, target_BTD, valid_BT.to(device)), specs


def make_step(block: Any, dtype: torch.dtype, mode: str, compiler: str) -> Callable[[], None]:
    """A function that takes one step after another."""
    block_fn, tensors, batch, specs = block
    weights = func.split_tensors(tensors, specs)
    fusion = func.fuse(weights.tuned, specs)
    params = fusion.merge(func.init_params(weights.tuned))
    frozen = {name: tensor.to(dtype) for name, tensor in weights.frozen.items()}
    weights = func.BlockWeights(fusion.merge(weights.tuned), frozen)
    rate = func.signsgd(func.linear_decay(1 / 200, 200))
    optimizer = func.partition({"offset": rate, "clip": rate}, func.by_field)
    plain = func.make_step(fusion.lift(block_fn), fusion.specs, optimizer, dtype=dtype)
    step = jit(plain, compiler=None if mode == "eager" else compiler)
    if mode == "autotuned":
        step = torch.compile(plain, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")
    states = [func.init_state(params, optimizer, keep_best=False)]

    def take() -> None:
        states[0], _ = step(weights, states[0], batch)

    return record(lambda state: step(weights, state, batch)[0], states[0]) if mode == "graph" else take


def record(step: Callable[[func.TuneState], func.TuneState], state: func.TuneState) -> Callable[[], None]:
    """A CUDA graph of a step that leaves its result where it found its state."""

    def take() -> None:
        for leaf, new in zip(tree_leaves(state), tree_leaves(step(state)), strict=True):
            leaf.copy_(new)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            take()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take()
    return graph.replay


def make_bound(tensors: Mapping[str, Tensor], tokens: int, dtype: torch.dtype) -> tuple[Callable[[], None], float]:
    """The linear layers' products alone, and their floating-point operations."""
    products: list[tuple[Tensor, Tensor]] = []
    operations = 0.0
    for name, weight_OI in tensors.items():
        if weight_OI.ndim != 2:
            continue
        out_features, in_features = weight_OI.shape
        weight = weight_OI.to(dtype)
        x = torch.randn(tokens, in_features, device=weight.device).to(dtype)
        grad = torch.randn(tokens, out_features, device=weight.device).to(dtype)
        own = [(x, weight.t()), (grad.t(), x)]
        if not name.startswith(("self_attn.q", "self_attn.k", "self_attn.v")):
            own.append((grad, weight))
        products += own
        operations += 2.0 * tokens * out_features * in_features * len(own)

    def multiply() -> None:
        for left, right in products:
            torch.mm(left, right)

    return multiply, operations


def timed(runs: Mapping[str, Callable[[], None]], seconds: float, wait: Callable[[], None]) -> dict[str, float]:
    """Median seconds of each, in rounds that alternate."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in (run for run in runs.values() for _ in range(WARM_UP)):
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in taken.items()}


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the first step, a step, its bound and the square product; rates in GFLOP/s; dtype and attention."""
    backend, device = select(options.device)
    with nullcontext() if options.mkl else float32_products(device):
        return _measured(options, backend, device)


def _measured(options: argparse.Namespace, backend: Backend, device: torch.device) -> dict[str, Any]:
    dtype = getattr(torch, options.dtype) if options.dtype else backend.compute_dtype()
    attention = options.attention or backend.attention(options.seqlen)
    block = make_block(options, device, dtype, attention)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    start = time.perf_counter()
    take = make_step(block, dtype, options.mode, backend.compiler)
    take()
    wait()
    first = time.perf_counter() - start
    bound, operations = make_bound(block[1], options.batch * options.seqlen, dtype)
    left, right = (torch.randn(SQUARE, SQUARE, device=device).to(dtype) for _ in range(2))
    runs = {"step": take, "bound": bound, "square": lambda: torch.mm(left, right)}
    found = timed(runs, options.seconds, wait)  # type: ignore[arg-type]
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return {
        "dtype": str(dtype), "attention": attention, "first": first, **found, "gigabytes": memory,
        "bound_rate": operations / found["bound"] / 1e9, "square_rate": 2 * SQUARE**3 / found["square"] / 1e9,
        "fraction": found["bound"] / found["step"]}  # fmt: skip


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Options from the command line, or from words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", choices=WIDTHS, default="smollm2", help="whose widths")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--mode", choices=MODES, default="compiled")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="the backend's choice by default")
    parser.add_argument("--mkl", action="store_true", help="multiply float32 as torch does by itself")
    parser.add_argument("--attention", choices=("eager", "sdpa"), help="the backend's choice by default")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args(words)


def run() -> None:
    """Measure and print."""
    options = parse()
    print(machine.describe(), flush=True)
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
    found = measured(options)
    print(f"{options.like}, {options.batch} x {options.seqlen} tokens, {options.bits} bits in groups of "
          f"{options.group_size}, {found['dtype']}, {found['attention']} attention, {options.mode}")  # fmt: skip
    print(f"first step, compilation included: {found['first']:.1f} s")
    print(f"step: {1e3 * found['step']:.1f} ms")
    print(f"its linear layers' products alone: {1e3 * found['bound']:.1f} ms, {found['bound_rate']:,.0f} GFLOP/s")
    print(f"a square product of {SQUARE}: {found['square_rate']:,.0f} GFLOP/s")
    print(f"fraction of the bound: {found['fraction']:.2f}")
    if found["gigabytes"]:
        print(f"most memory on the GPU: {found['gigabytes']:.2f} GB")
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    run()
