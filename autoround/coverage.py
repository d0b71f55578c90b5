"""How many calibration tokens each expert of a mixture took, as the journal keeps it with every block. Torch-free."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from autoround.progress import median

if TYPE_CHECKING:
    from torch import Tensor

# Experts that fewer tokens reach are starved: steps would fit those tokens alone. Measured on synthetic inputs of one
# small shape only (64 x 64, 2 bits, 200 steps, three seeds), by the error on other tokens: up to 268 tokens steps made
# it 5 to 12% larger, at about 520 they changed it by 2% either way, from 2400 on they mostly helped.
# Whole blocks of 32 experts differ: `python -m benchmarks.starved` of 4, 16, 64 and 128 rows, of whose experts
# 100, 99, 66 and 41% are starved, finds the error on other tokens 2.1% larger, 3.3, 2.2 and 1.1% smaller where all take
# steps, and that of route_all 1.4 and 1.2% larger, 0.1 and 0.1% smaller. So 512 may be too many, but these weights are
# random, and trained mixtures are not measured yet.
STARVED_TOKENS = 512
# What the names of these numbers begin with, among those of a block.
_KIND = "tokens:"


def token_stats(tokens: "Mapping[str, Tensor]") -> dict[str, float]:
    """Numbers to keep with a block.

    Args:
        tokens: module of experts -> tokens of each expert, (E,).
    """
    counts = {path: own_E.tolist() for path, own_E in tokens.items()}
    return {f"{_KIND}{path}:{expert}": count for path, own in counts.items() for expert, count in enumerate(own)}


def coverage(stats: Mapping[str, float]) -> dict[str, tuple[int, ...]]:
    """Module of experts -> tokens of each expert, from the numbers kept with a block.

    >>> coverage({"loss_last": 0.5, "tokens:mlp.experts:0": 7.0, "tokens:mlp.experts:1": 0.0})
    {'mlp.experts': (7, 0)}
    """
    found: dict[str, dict[int, int]] = defaultdict(dict)
    for name, value in stats.items():
        if name.startswith(_KIND):
            path, _, expert = name.removeprefix(_KIND).rpartition(":")
            found[path][int(expert)] = int(value)
    return {path: tuple(count for _, count in sorted(own.items())) for path, own in found.items()}


def told(stats: Mapping[str, float]) -> dict[str, Any]:
    """The numbers kept with a block as fields of ``BlockDone``.

    >>> told({"loss_last": 0.5, "tokens:mlp.experts:0": 7.0})
    {'loss_last': 0.5, 'tokens': {'mlp.experts': (7,)}}
    """
    losses = {name: value for name, value in stats.items() if not name.startswith(_KIND)}
    return {**losses, "tokens": coverage(stats)}


def coverage_table(blocks: Iterable[tuple[str, Mapping[str, tuple[int, ...]]]], starved: int = STARVED_TOKENS) -> str:
    """Lines of text: for each block the fewest, median and most tokens of its experts, and how many are starved.

    Args:
        blocks: path of every block, and module of experts -> tokens of each expert.
        starved: those with fewer tokens are.

    Returns:
        Empty for a model without experts.

    >>> print(coverage_table([("model.layers.0", {"mlp.experts": (7, 501)})], 128))
    tokens per expert             fewest   median     most  below 128
    model.layers.0.mlp.experts         7      254      501       1 of 2
    """
    rows = []
    for title, modules in blocks:
        for path, counts in modules.items():
            share = f"{sum(count < starved for count in counts)} of {len(counts)}"
            numbers = f"{min(counts):>8} {median(counts):>8.0f} {max(counts):>8} {share:>12}"
            rows.append((f"{title}.{path}", numbers))
    if not rows:
        return ""
    width = max(len(name) for name, _ in rows) + 1
    head = f"{'tokens per expert':<{width}} {'fewest':>8} {'median':>8} {'most':>8}  below {starved}"
    return "\n".join((head, *(f"{name:<{width}} {numbers}" for name, numbers in rows)))
