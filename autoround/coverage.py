"""How many calibration tokens each expert of a mixture took, as the journal keeps it with every block. Torch-free."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# What the names of these numbers begin with, among those of a block.
_KIND = "tokens:"


def token_stats(tokens: "Mapping[str, Tensor]") -> dict[str, float]:
    """Numbers to keep with a block.

    Args:
        tokens: module of experts -> tokens of each expert, (E,).
    """
    counts = {path: own_E.tolist() for path, own_E in tokens.items()}
    return {f"{_KIND}{path}:{expert}": count for path, own in counts.items() for expert, count in enumerate(own)}


def is_token_count(name: str) -> bool:
    """Whether a number kept with a block is one of these.

    >>> is_token_count("tokens:mlp.experts:0"), is_token_count("loss_last")
    (True, False)
    """
    return name.startswith(_KIND)


def coverage(stats: Mapping[str, float]) -> dict[str, tuple[int, ...]]:
    """Module of experts -> tokens of each expert, from the numbers kept with a block.

    >>> coverage({"loss_last": 0.5, "tokens:mlp.experts:0": 7.0, "tokens:mlp.experts:1": 0.0})
    {'mlp.experts': (7, 0)}
    """
    found: dict[str, dict[int, int]] = defaultdict(dict)
    for name, value in stats.items():
        if is_token_count(name):
            path, _, expert = name.removeprefix(_KIND).rpartition(":")
            found[path][int(expert)] = int(value)
    return {path: tuple(count for _, count in sorted(own.items())) for path, own in found.items()}


def coverage_table(blocks: Iterable[tuple[str, Mapping[str, float]]], starved: int) -> str:
    """Lines of text: for each block the fewest, median and most tokens of its experts, and how many are starved.

    Args:
        blocks: title and numbers of every block.
        starved: experts with fewer tokens stay as they start.

    Returns:
        Empty for a model without experts.

    >>> print(coverage_table([("model.layers.0", {"tokens:mlp.experts:0": 7, "tokens:mlp.experts:1": 500})], 128))
    tokens per expert             fewest   median     most  below 128
    model.layers.0.mlp.experts         7      500      500       1 of 2
    """
    rows = []
    for title, stats in blocks:
        for path, counts in coverage(stats).items():
            below, middle = sum(count < starved for count in counts), sorted(counts)[len(counts) // 2]
            share = f"{below} of {len(counts)}"
            rows.append((f"{title}.{path}", f"{min(counts):>8} {middle:>8} {max(counts):>8} {share:>12}"))
    if not rows:
        return ""
    width = max(len(name) for name, _ in rows) + 1
    head = f"{'tokens per expert':<{width}} {'fewest':>8} {'median':>8} {'most':>8}  below {starved}"
    return "\n".join((head, *(f"{name:<{width}} {numbers}" for name, numbers in rows)))
