"""A Llama small enough to be trained in minutes, with weights as training leaves them and rows of whole GGUF blocks.

Its text is Python's documentation, but for the held-out part. ``python -m benchmarks.small_llama FOLDER`` trains the
model and its byte-level tokenizer, saves both in bfloat16, and prints the perplexity on the held-out part.

Legend: B rows of a batch, T tokens in a row, N rows.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from autoround.data.python_docs import python_docs
from benchmarks import machine
from benchmarks.smollm2 import held_out_rows

VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
# Every width is a multiple of 256, the columns of a K-quant's block.
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KEY_VALUE_HEADS = 256, 768, 4, 4, 2
SEQLEN, BATCH, EPOCHS = 256, 8, 6
PEAK_RATE, WARMUP_STEPS, WEIGHT_DECAY, CLIP_NORM = 3e-3, 40, 0.1, 1.0


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that splits as GPT-2 does."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def make_model(end_of_text: int) -> LlamaForCausalLM:
    """An untrained model, drawn from torch's global generator."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=2048,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, stream: Tensor) -> None:
    """Fit a model to a stream of tokens with AdamW; the rate rises for a few steps, then falls to 0 in a line."""
    batches = list(_batches(stream))
    rate = torch.tensor(0.0)
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim != 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    start = time.monotonic()
    for step, tokens_BT in enumerate(batches):
        rising, falling = (step + 1) / WARMUP_STEPS, 1 - step / len(batches)
        rate.fill_(PEAK_RATE * min(rising, falling))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}/{len(batches)}: loss {loss.item():.3f}, {time.monotonic() - start:.0f} s", flush=True)


def perplexity(model: LlamaForCausalLM, rows_NT: Tensor) -> float:
    """exp of the mean negative log likelihood of rows."""
    with torch.inference_mode():
        losses = [model(input_ids=row_1T, labels=row_1T, use_cache=False).loss for row_1T in rows_NT.split(1)]
    return math.exp(torch.stack(losses).mean().item())


def save_trained(folder: Path, *, seed: int = 0) -> None:
    """Train the model and write it with its tokenizer."""
    torch.manual_seed(seed)
    texts = python_docs(("train",))
    random.Random(seed).shuffle(texts)
    tokenizer = train_tokenizer(texts)
    stream = torch.tensor(tokenizer(END_OF_TEXT.join(texts), verbose=False).input_ids)
    model = make_model(tokenizer.eos_token_id)
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"{weights / 1e6:.1f} M weights, {len(stream)} tokens of text, {EPOCHS} times", flush=True)
    train(model.train(), stream)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _batches(stream: Tensor) -> Iterator[Tensor]:
    """Rows of the stream in random order, cut at another place in every epoch; (B, T)."""
    for _ in range(EPOCHS):
        start = int(torch.randint(SEQLEN, ()))
        rows_NT = stream[start : start + (len(stream) - start) // SEQLEN * SEQLEN].view(-1, SEQLEN)
        yield from rows_NT[torch.randperm(len(rows_NT))].split(BATCH)


def run() -> None:
    """Parse options, train, save and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(machine.describe(), flush=True)
    start = time.monotonic()
    save_trained(options.folder, seed=options.seed)
    print(f"trained in {time.monotonic() - start:.0f} s")
    model = LlamaForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    rows_NT = held_out_rows(PreTrainedTokenizerFast.from_pretrained(options.folder), seqlen=SEQLEN)
    print(f"held-out perplexity {perplexity(model, rows_NT):.2f} over {rows_NT.numel()} tokens")


if __name__ == "__main__":
    run()
