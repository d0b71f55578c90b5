"""The judge: how far checkpoints are from the float model, in four domains of text, with what chance leaves open.

``python -m benchmarks.quality --reference FOLDER CHECKPOINT… [--tokens N] [--domains NAME …] [--json FILE]`` scores any
number of checkpoints that ``autoround.load`` reads: KL divergence from the float model (nats per token), perplexity and
the share of tokens on which both rank the same token first, for each domain of ``benchmarks/domains.py`` and over all.
Standard errors and 95% intervals are bootstrapped over documents, the same draws for all, so that differences to the
first checkpoint are paired. Each batch passes through the float model once and then through all checkpoints, which are
all in memory; nothing of it is kept.

Legend: B documents in a batch, T tokens in a row, P predicted tokens, V vocabulary, D documents, R bootstrap draws.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

import autoround
from autoround.backends.cpu import CPU
from autoround.backends.products import float32_products
from autoround.evaluate.scores import score
from autoround.formats.packed import PackedLinear
from benchmarks import domains, machine

FLOAT, ALL = "float", "all"
BATCH_TOKENS = 2048
# Predicted tokens whose logits are compared at a time: few enough for the processor's caches.
CHUNK = 64
DRAWS = 2000


class DocumentScores(NamedTuple):
    """Sums over the predicted tokens of each document (D of them), float64.

    Attributes:
        tokens_D: how many tokens are predicted.
        nll_D: negative log likelihood of the true tokens, in nats.
        kl_D: KL divergence from the float model's distribution, in nats.
        agrees_D: tokens on which both rank the same token first.
    """

    tokens_D: Tensor
    nll_D: Tensor
    kl_D: Tensor
    agrees_D: Tensor


class Estimate(NamedTuple):
    """A measure, its standard error, and how far it lies above the first checkpoint's, with a 95% interval."""

    value: float
    error: float
    difference: float
    low: float
    high: float


MEASURES: dict[str, Callable[[DocumentScores, Tensor], Tensor]] = {
    "kl": lambda scores, count_RD: (count_RD @ scores.kl_D) / (count_RD @ scores.tokens_D),
    "perplexity": lambda scores, count_RD: ((count_RD @ scores.nll_D) / (count_RD @ scores.tokens_D)).exp(),
    "top1": lambda scores, count_RD: (count_RD @ scores.agrees_D) / (count_RD @ scores.tokens_D),
}
"""Each maps sums and how often every document is drawn (R, D) to R values."""
LABELS = {"kl": "KL", "perplexity": "perplexity", "top1": "same top token"}


def judge(
    reference: nn.Module, candidates: Mapping[str, nn.Module], documents: Sequence[Sequence[int]]
) -> dict[str, DocumentScores]:
    """Score models on documents, the reference's own likelihoods included under the name ``FLOAT``.

    Args:
        reference: a causal language model of transformers; scores are computed on its device.
        candidates: name -> model with the same vocabulary, on the same device.
        documents: token ids, at least two each; each is scored on its own.
    """
    models, device = {FLOAT: reference, **candidates}, next(reference.parameters()).device
    tokens_D = torch.tensor([len(row) - 1 for row in documents], dtype=torch.float64, device=device)
    sums = {name: torch.zeros(3, len(documents), dtype=torch.float64, device=device) for name in models}
    for batch in _batches(documents):
        tokens_BT, indices_B = (each.to(device) for each in batch)
        followed_BT = tokens_D[indices_B, None] > torch.arange(tokens_BT.shape[1] - 1, device=device)
        next_P = tokens_BT[:, 1:][followed_BT]
        owner_P = indices_B.repeat_interleave(followed_BT.sum(1))
        expected_PV = _logits(reference, tokens_BT, followed_BT).float().log_softmax(-1)
        for name, model in models.items():
            found_PV = expected_PV if model is reference else _logits(model, tokens_BT, followed_BT)
            chunks = (each.split(CHUNK) for each in (expected_PV, found_PV, next_P, owner_P))
            for expected_CV, found_CV, next_C, owner_C in zip(*chunks, strict=True):
                log_CV = expected_CV if model is reference else found_CV.float().log_softmax(-1)
                scores = score(expected_CV, log_CV, next_C)
                sums[name].index_add_(1, owner_C, torch.stack([field.double() for field in scores]))
    return {name: DocumentScores(tokens_D.cpu(), *own.cpu()) for name, own in sums.items()}


def _batches(documents: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Documents of similar length, padded at their ends, which no earlier token sees; and their indices."""
    order = sorted(range(len(documents)), key=lambda index: -len(documents[index]))
    while order:
        width = len(documents[order[0]])
        count = max(1, BATCH_TOKENS // width)
        taken, order = order[:count], order[count:]
        rows = [[*documents[index], *[0] * (width - len(documents[index]))] for index in taken]
        yield torch.tensor(rows), torch.tensor(taken)


def _logits(model: nn.Module, tokens_BT: Tensor, followed_BT: Tensor) -> Tensor:
    with torch.inference_mode(), float32_products(tokens_BT.device):
        logits_BTV: Tensor = model(input_ids=tokens_BT, use_cache=False).logits[:, :-1]
        return logits_BTV[followed_BT]


def dense(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose packed layers are replaced by dense ones, which do not dequantize in every call."""
    for path, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(module.dequantize().t().to(model.dtype).contiguous(), requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(path, linear)
    return model


def draw(sizes: Sequence[int], *, seed: int = 0) -> list[Tensor]:
    """How often each document of each domain is drawn: (R, D) counts, D drawn from D with replacement.

    Args:
        sizes: documents of each domain.
        seed: same seed and sizes, same draws.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = []
    for size in sizes:
        drawn_RD = torch.randint(size, (DRAWS, size), generator=generator)
        ones_RD = torch.ones(drawn_RD.shape, dtype=torch.float64)
        counts.append(torch.zeros_like(ones_RD).scatter_add_(1, drawn_RD, ones_RD))
    return counts


def estimate(
    scores: Mapping[str, Mapping[str, DocumentScores]],
) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Measures with errors and paired differences to the first model.

    Args:
        scores: model -> domain -> sums; all have the same documents.

    Returns:
        model -> domain, or ``ALL`` -> measure -> estimate. Over all domains tokens count alike, and documents are drawn
        within their domains.
    """
    first = next(iter(scores.values()))
    counts = dict(zip(first, draw([len(own.tokens_D) for own in first.values()]), strict=True))
    counts[ALL] = torch.cat(list(counts.values()), 1)
    found: dict[str, dict[str, dict[str, Estimate]]] = {}
    for name, own in scores.items():
        found[name] = {
            domain: {
                measure: _estimate(measure, _part(own, domain), _part(first, domain), count_RD) for measure in MEASURES
            }
            for domain, count_RD in counts.items()
        }
    return found


def _part(scores: Mapping[str, DocumentScores], domain: str) -> DocumentScores:
    if domain != ALL:
        return scores[domain]
    return DocumentScores(*(torch.cat(fields) for fields in zip(*scores.values(), strict=True)))


def _estimate(measure: str, own: DocumentScores, first: DocumentScores, count_RD: Tensor) -> Estimate:
    value, once = MEASURES[measure], torch.ones(1, count_RD.shape[1], dtype=torch.float64)
    drawn_R = value(own, count_RD)
    low, high = torch.quantile(drawn_R - value(first, count_RD), torch.tensor([0.025, 0.975]).double()).tolist()
    middle = float(value(own, once))
    return Estimate(middle, float(drawn_R.std()), middle - float(value(first, once)), low, high)


def score_checkpoints(
    reference: Path, checkpoints: Sequence[str], *, tokens: int, names: Sequence[str], dtype: torch.dtype
) -> dict[str, dict[str, DocumentScores]]:
    """Load and score checkpoints, the float model included as ``FLOAT``.

    Args:
        reference: folder of the float model.
        checkpoints: folders or GGUF files.
        tokens: predicted tokens over all domains, at least.
        names: of the domains.
        dtype: of all models.

    Returns:
        checkpoint -> domain -> sums.

    Raises:
        AutoRoundError: a checkpoint that cannot be read, or a domain with too little text.
    """
    tokenizer = AutoTokenizer.from_pretrained(reference)
    share = -(-tokens // len(names))
    rows = {name: domains.read(name, reference, tokenizer, tokens=share) for name in names}
    models = {path: dense(autoround.load(path, dtype=dtype).eval()) for path in checkpoints}
    found = judge(autoround.load(reference, dtype=dtype).eval(), models, [row for own in rows.values() for row in own])
    sizes = [len(own) for own in rows.values()]
    parts = {name: zip(*(field.split(sizes) for field in own), strict=True) for name, own in found.items()}
    return {
        name: {domain: DocumentScores(*fields) for domain, fields in zip(rows, own, strict=True)}
        for name, own in parts.items()
    }


def as_json(scores: Mapping[str, Mapping[str, DocumentScores]]) -> dict[str, Any]:
    """Estimates, and the sums of every document from which they and later comparisons are made."""
    estimates = {
        name: {domain: {measure: each._asdict() for measure, each in own.items()} for domain, own in domains.items()}
        for name, domains in estimate(scores).items()
    }
    sums = {
        name: {domain: {key: field.tolist() for key, field in each._asdict().items()} for domain, each in own.items()}
        for name, own in scores.items()
    }
    return {"estimates": estimates, "documents": sums}


def print_table(scores: Mapping[str, Mapping[str, DocumentScores]]) -> None:
    """Every checkpoint's measures in each domain."""
    checkpoints = {name: own for name, own in scores.items() if name != FLOAT}
    first, found = next(iter(checkpoints)), estimate(checkpoints)
    plain = estimate({FLOAT: scores[FLOAT]})[FLOAT]
    for domain, own in plain.items():
        part = _part(scores[FLOAT], domain)
        print(f"\n{domain}: {len(part.tokens_D)} documents, {int(part.tokens_D.sum()):,} tokens, "
              f"perplexity of the float model {own['perplexity'].value:.3f}")  # fmt: skip
        for name in checkpoints:
            print(f"  {_line(found[name][domain], differences=False)}   {name}")
            if name != first:
                print(f"  {_line(found[name][domain], differences=True)}   beside {first}")


def _line(own: Mapping[str, Estimate], *, differences: bool) -> str:
    if differences:
        texts = [f"{each.difference:+.5f} ({each.low:+.5f} … {each.high:+.5f})" for each in own.values()]
    else:
        texts = [f"{each.value:.5f} +- {each.error:.5f}" for each in own.values()]
    return "   ".join(f"{LABELS[measure]} {text}" for measure, text in zip(own, texts, strict=True))


def run() -> None:
    """Parse options, score, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--reference", type=Path, required=True, help="folder of the float model")
    parser.add_argument("--tokens", type=int, default=52_000, help="predicted ones, over all domains")
    parser.add_argument("--domains", nargs="+", choices=domains.DOMAINS, default=domains.DOMAINS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of all models; by default the backend's")
    parser.add_argument("--json", type=Path, help="file for estimates and for the sums of every document")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype) if options.dtype else CPU.compute_dtype()
    print(f"{machine.describe()}\nall models in {dtype}; +- standard errors, in brackets 95% intervals, "
          f"bootstrap over documents", flush=True)  # fmt: skip
    scores = score_checkpoints(
        options.reference, options.checkpoints, tokens=options.tokens, names=options.domains, dtype=dtype
    )
    print_table(scores)
    if options.json:
        about = {"machine": machine.describe(), "reference": str(options.reference), "dtype": str(dtype)}
        options.json.write_text(json.dumps(about | as_json(scores)))


if __name__ == "__main__":
    run()
