"""Making the plan: formats, shapes and the user's wishes decide the fate of every weight. Torch-free."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autoround.errors import UsageError
from autoround.layers import LayerSetting, assign
from autoround.plan import (
    BlockPlan,
    FormatRules,
    LayerPlan,
    LayerShape,
    Plan,
    Structure,
    check_format,
    check_group,
    check_head,
    check_spec,
    left_alone,
    misfit,
)
from autoround.spec import WHOLE_ROW, QuantSpec, WeightSpec

FITTING_GROUP_SIZES = (1024, 512, 256, 128, 64, 32, 16)
# Layers that inference servers run as one.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def resolve(
    spec: QuantSpec,
    odd_shapes: str,
    structure: Structure,
    rules: Sequence[FormatRules],
    *,
    settings: Sequence[LayerSetting] = (),
    head: bool = False,
    nontext: bool = False,
) -> Plan:
    """Decide the fate of every weight.

    Args:
        spec: what the user asked for.
        odd_shapes: for rows that ``spec.group_size`` does not divide: "fit" takes the largest group size that the
            layer and every format take, "keep" leaves the layer unquantized, "fail" raises.
        structure: the model.
        rules: of every requested format.
        settings: of single layers, laid over ``spec``.
        head: quantize the output head too; so does a setting that names the head and no layer of a block.
        nontext: quantize towers for images too, and what joins them to the language model.

    Raises:
        UsageError: a format cannot hold the specs, a shape does not fit, a setting names no layer, or none is left to
            quantize.
    """
    for rule in rules:
        check_spec(spec, rule, f"format {rule.name}")
        check_head(head, rule)
    layers = [layer for block in structure.blocks for layer in block.layers]
    ends = [layer for layer in structure.outside if layer.path == structure.head]
    if head and not ends:
        raise UsageError(
            f"quant_lm_head: found no output head in {structure.architecture}; needed one that is a linear layer; "
            "leave it out"
        )
    layers += ends if head or _asked_for(ends, settings, layers) else []
    towers = [layer for layer in structure.outside if layer.nontext]
    if nontext and not towers:
        raise UsageError(
            f"quant_nontext_module: found no tower for images in {structure.architecture}; needed one; leave it out"
        )
    layers += towers if nontext else []
    paths = [layer.path for layer in layers]
    own = assign(settings, paths, [layer.path for layer in structure.outside if layer.path not in paths])
    spec = replace(spec, zero_min=max((rule.zero_min for rule in rules), default=0))
    spec, notes = _fit_whole_model(spec, odd_shapes, [layer for layer in layers if _follows(layer, own)], rules)
    wish = _Wish(spec=spec, odd_shapes=odd_shapes, rules=tuple(rules))
    fates = {layer.path: wish.fate(layer, own.get(layer.path)) for layer in layers}
    if not any(fate.spec for fate in fates.values()):
        reasons = sorted({fate.reason for fate in fates.values()})
        raise UsageError(
            f"plan: found no layer to quantize ({'; '.join(reasons)}); use a smaller --group_size or other formats"
        )
    blocks = tuple(
        BlockPlan(path=block.path, layers=tuple(fates[layer.path] for layer in block.layers))
        for block in structure.blocks
    )
    outside = tuple(fates.get(layer.path) or left_alone(layer) for layer in structure.outside)
    notes += [
        *_refitted(fates, own, spec),
        *_kept(fates, own),
        *_untied(outside),
        *_fused(blocks),
        *_apart(fates, rules),
    ]
    plan = Plan(
        architecture=structure.architecture, spec=_plain(spec), blocks=blocks, outside=outside, notes=tuple(notes)
    )
    for rule in rules:
        check_format(plan, rule)
    return plan


def _plain(spec: QuantSpec) -> QuantSpec:
    """A spec that says nothing that makes no difference: so codes of one format serve another where they may."""
    return replace(spec, zero_min=0) if spec.sym else spec


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """What layers get where no setting of their own says otherwise."""

    spec: QuantSpec
    odd_shapes: str
    rules: tuple[FormatRules, ...]

    def fate(self, layer: LayerShape, own: LayerSetting | None) -> LayerPlan:
        """What becomes of a layer."""
        if own is not None and own.keep:
            return LayerPlan(shape=layer, spec=None, reason=f"asked for by {own.flag} {own.pattern}")
        if reason := misfit(layer, self.rules):
            return LayerPlan(shape=layer, spec=None, reason=reason)
        spec = _plain(self.spec if own is None else own.over(self.spec))
        if self._fits(layer, spec):
            return LayerPlan(shape=layer, spec=spec)
        if self.odd_shapes == "fail":
            try:
                spec.group_of(layer.in_features)
            except UsageError as error:
                raise UsageError(f"{layer.path}: {error}") from None
        alone = own is not None and own.sets_group
        if self.odd_shapes == "fit" and (alone or not any(rule.uniform_group for rule in self.rules)):
            for fitted in (replace(spec, group_size=size) for size in _sizes_below(spec.group_size)):
                if self._fits(layer, fitted):
                    return LayerPlan(shape=layer, spec=fitted)
        for rule in self.rules:
            check_group(spec.group_size, rule, f"format {rule.name}: {layer.path}")
        reason = f"group_size {spec.group_size} does not divide in_features {layer.in_features}"
        return LayerPlan(shape=layer, spec=None, reason=reason)

    def _fits(self, layer: LayerShape, spec: QuantSpec) -> bool:
        """Whether groups divide the rows and every format takes them."""
        divides = spec.group_size == WHOLE_ROW or layer.in_features % spec.group_size == 0
        return divides and all(rule.takes_group(spec.group_size) for rule in self.rules)


def _asked_for(ends: Sequence[LayerShape], settings: Sequence[LayerSetting], layers: Sequence[LayerShape]) -> bool:
    """Whether a setting wants the head quantized: one that names it and no layer of a block."""
    return any(
        not each.keep and any(each.names(end.path) for end in ends) and not any(each.names(own.path) for own in layers)
        for each in settings
    )


def _follows(layer: LayerShape, own: Mapping[str, LayerSetting]) -> bool:
    """Whether a layer takes the group size of the whole model."""
    setting = own.get(layer.path)
    return setting is None or not (setting.keep or setting.sets_group)


def _fit_whole_model(
    spec: QuantSpec, odd_shapes: str, layers: Sequence[LayerShape], rules: Sequence[FormatRules]
) -> tuple[QuantSpec, list[str]]:
    """The group size for the whole model where a format needs a single one."""
    rows = {layer.in_features for layer in layers if not misfit(layer, rules)}
    uniform = any(rule.uniform_group for rule in rules)
    unfit = sorted(row for row in rows if spec.group_size != WHOLE_ROW and row % spec.group_size)
    refused = [rule for rule in rules if not rule.takes_group(spec.group_size)]
    for size in _sizes_below(spec.group_size) if odd_shapes == "fit" and (refused or (uniform and unfit)) else ():
        if all(rule.takes_group(size) for rule in rules) and (not uniform or all(row % size == 0 for row in rows)):
            cause = (
                f"{refused[0].name} does not take {spec.group_size}"
                if refused
                else f"{spec.group_size} does not divide rows of {unfit[0]}"
            )
            return replace(spec, group_size=size), [f"group size {size} for the whole model: {cause}"]
    for rule in refused:
        check_group(spec.group_size, rule, f"format {rule.name}")
    return spec, []


def _sizes_below(group_size: int) -> list[int]:
    return [size for size in FITTING_GROUP_SIZES if size < group_size]


def _refitted(fates: Mapping[str, LayerPlan], own: Mapping[str, LayerSetting], spec: QuantSpec) -> list[str]:
    """How many layers have another group size than they should."""
    asked = {path: own[path].over(spec) if path in own else spec for path in fates}
    sizes = [
        asked[path].group_size
        for path, fate in fates.items()
        if fate.spec is not None and fate.spec.group_size != asked[path].group_size
    ]
    if not sizes:
        return []
    than = " or ".join(map(str, sorted(set(sizes))))
    return [f"{len(sizes)} layers take a smaller group size than {than}, which does not divide their rows"]


def _kept(fates: Mapping[str, LayerPlan], own: Mapping[str, LayerSetting]) -> list[str]:
    """Layers that are kept though nobody asked for it."""
    fixed = Counter(fate.reason for fate in fates.values() if fate.reason and (fate.shape.fixed or fate.shape.whole))
    return [
        f"{path} is kept: {fate.reason}"
        for path, fate in fates.items()
        if fate.spec is None and fate.reason not in fixed and not (path in own and own[path].keep)
    ] + [f"{count} layers are kept: {reason}" for reason, count in fixed.items()]


def _untied(outside: Sequence[LayerPlan]) -> list[str]:
    return [
        f"{layer.shape.path} is untied from {layer.shape.tied_to}, which stays unquantized"
        for layer in outside
        if layer.spec is not None and layer.shape.tied_to
    ]


def _apart(fates: Mapping[str, LayerPlan], rules: Sequence[FormatRules]) -> list[str]:
    """Stacks of experts whose matrices packed layouts store under names that no other loader knows."""
    packed = any(not rule.any_grid for rule in rules)
    count = sum(fate.spec is not None and fate.shape.whole for fate in fates.values() if packed)
    told = "stacks of experts that checkpoints hold in one tensor are stored one by one, which this package alone reads"
    return [f"{count} {told}; --ignore_layers experts keeps them"] if count else []


def _fused(blocks: Sequence[BlockPlan]) -> list[str]:
    """Layers that servers run as one and that differ."""
    places: dict[tuple[str, ...], list[str]] = {}
    for block in blocks:
        specs = {layer.shape.path: layer.spec for layer in block.layers}
        for parent in dict.fromkeys(path.rpartition(".")[0] for path in specs):
            for names in FUSED.values():
                found = [specs[f"{parent}.{name}"] for name in names if f"{parent}.{name}" in specs]
                if len(set(found)) > 1:
                    places.setdefault(names, []).append(parent)
    return [
        f"{', '.join(names[:-1])} and {names[-1]} differ in {parents[0]}"
        f"{f' and {len(parents) - 1} more' if len(parents) > 1 else ''}: "
        "vLLM and SGLang run them as one layer and refuse packed formats of this model"
        for names, parents in places.items()
    ]


def recorded(structure: Structure, spec: WeightSpec, specs: Mapping[str, WeightSpec]) -> Plan:
    """The plan of codes that are there already.

    Args:
        structure: the model.
        spec: what most layers have.
        specs: path -> spec of every quantized layer.

    Raises:
        UsageError: a quantized layer is not one of the model's.
    """
    blocks = tuple(
        BlockPlan(path=block.path, layers=tuple(_as_recorded(layer, specs) for layer in block.layers))
        for block in structure.blocks
    )
    outside = tuple(
        _as_recorded(shape, specs) if shape.path in specs else left_alone(shape) for shape in structure.outside
    )
    plan = Plan(architecture=structure.architecture, spec=spec, blocks=blocks, outside=outside)
    if unknown := sorted(set(specs) - set(plan.specs)):
        raise UsageError(
            f"{unknown[0]}: found codes of a layer that {structure.architecture} does not have; "
            "needed the model that was quantized; check --model"
        )
    return plan


def _as_recorded(layer: LayerShape, specs: Mapping[str, WeightSpec]) -> LayerPlan:
    spec = specs.get(layer.path)
    return LayerPlan(shape=layer, spec=spec, reason="" if spec else "kept when the codes were made")
