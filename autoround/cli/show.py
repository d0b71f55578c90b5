"""A plan as text: what happens to every layer, equal fates on one line."""

from collections import Counter
from collections.abc import Iterable

from autoround.plan import LayerPlan, Plan


def show_plan(plan: Plan, formats: str = "") -> str:
    """Lines that ``--dry_run`` prints: layers by fate and shape, then what is worth telling.

    Args:
        plan: of one run.
        formats: what it is for, where a command has several runs, each tuned on a grid of its own.
    """
    inside = [layer for block in plan.blocks for layer in block.layers]
    fates = (*inside, *plan.outside)
    quantized = [layer for layer in fates if layer.spec is not None]
    kept = [layer for layer in fates if layer.spec is None]
    weights = sum(_weights(layer) for layer in quantized)
    lines = [f"{formats}, tuned on its own grid", ""] if formats else []
    lines += [
        f"{plan.architecture}: {len(plan.blocks)} blocks, {len(quantized)} layers to quantize with {weights:,} weights",
        "",
        "quantized",
        *_table((str(layer.spec), layer) for layer in quantized),
    ]
    if kept:
        lines += ["", "kept", *_table((layer.reason, layer) for layer in kept)]
    if plan.notes:
        lines += ["", "notes", *(f"  {note}" for note in plan.notes)]
    return "\n".join(lines)


def _table(fates: Iterable[tuple[str, LayerPlan]]) -> list[str]:
    """One line per fate, last part of the path and shape, with how many layers there are of it."""
    counts = Counter((fate, layer.shape.path.rpartition(".")[2], _shape(layer)) for fate, layer in fates)
    widths = [max((len(row[column]) for row in counts), default=0) for column in range(3)]
    return [
        f"  {count:5} x {name:{widths[1]}}  {shape:>{widths[2]}}  {fate}".rstrip()
        for (fate, name, shape), count in counts.items()
    ]


def _shape(layer: LayerPlan) -> str:
    return f"{layer.shape.out_features}x{layer.shape.in_features}"


def _weights(layer: LayerPlan) -> int:
    return layer.shape.out_features * layer.shape.in_features
