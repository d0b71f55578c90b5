"""The plan: the fate of every weight, decided before any work starts. Torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autoround.errors import UsageError
from autoround.spec import GgufSpec, QuantSpec, WeightSpec

_NAMED = 3
_ADVICE = "name the format when the run begins"
# Formats whose layers may differ.
_MIXED = "use auto_round, auto_gptq, gptq_v2, llm_compressor or fake"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """A weight that could be quantized.

    Attributes:
        path: module path in the model, such as ``model.layers.0.self_attn.q_proj``; of a stack of experts that of the
            parameter, such as ``model.layers.0.mlp.experts.gate_up_proj``.
        out_features: rows of the weight, those of all experts together.
        in_features: columns of the weight, along which groups run.
        tied_to: path of the module whose weight it shares, as an output head may that of the embedding; else empty.
        linear: False for other kinds of module, such as GPT-2's Conv1D.
        experts: how many are stacked in it; 0 where it is a single matrix.
        parts: matrices of an expert whose rows lie one below the other, each with a name of its own in checkpoints.
        whole: checkpoints hold all its experts in one tensor.
        fixed: why it stays in high precision whatever anybody wants; empty where it need not.
        nontext: it belongs to a tower for images, or to what joins that to the language model.
        stored: names of a stack's matrices in a checkpoint, expert by expert; empty where it is stored whole.
    """

    path: str
    out_features: int
    in_features: int
    tied_to: str = ""
    linear: bool = True
    experts: int = 0
    parts: int = 1
    whole: bool = False
    fixed: str = ""
    nontext: bool = False
    stored: tuple[tuple[str, ...], ...] = ()

    @property
    def parameter(self) -> str:
        """Name of the parameter that holds the weight."""
        return self.path if self.experts else f"{self.path}.weight"

    @property
    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """Names of a stack's matrices where a layout stores them one by one: as stored, or after the stack.

        >>> LayerShape(path="mlp.experts.down_proj", out_features=16, in_features=8, experts=2, whole=True).pieces
        (('mlp.experts.0.down_proj.weight',), ('mlp.experts.1.down_proj.weight',))
        """
        module, _, stack = self.path.rpartition(".")
        return self.stored or tuple((f"{module}.{expert}.{stack}.weight",) for expert in range(self.experts))

    @property
    def rows(self) -> int:
        """Rows of each matrix in it.

        >>> LayerShape(path="experts.gate_up_proj", out_features=96, in_features=8, experts=4, parts=2).rows
        12
        """
        return self.out_features // (max(self.experts, 1) * self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """A transformer block: its module path and its layers in definition order."""

    path: str
    layers: tuple[LayerShape, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What of a model matters for a plan.

    Attributes:
        architecture: class name, such as ``LlamaForCausalLM``.
        blocks: in call order.
        outside: layers outside all blocks (lm_head, …).
        head: path of the output head among them; empty where there is none.
    """

    architecture: str
    blocks: tuple[BlockShape, ...]
    outside: tuple[LayerShape, ...] = ()
    head: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatRules:
    """What a checkpoint layout and its loaders can hold.

    Attributes:
        name: as the user types it.
        bits: widths it stores.
        group_sizes: sizes its loaders run, -1 for whole rows; empty means any.
        uniform_group: shapes are fitted by one group size for the whole model.
        mixed: layers may have bits and group sizes of their own where the user wants it.
        multiple: out_features and in_features must be multiples of this.
        zero_min: smallest zero point it stores.
        scale_dtypes: of the scales it stores; empty means any.
        linear_only: its loaders replace linear modules only, not a Conv1D.
        head: it holds a quantized output head.
        whole_experts: it holds the experts of models whose checkpoints have them in one tensor.
        file_type: of GGUF, which decides the plan alone; empty for layouts of integer codes.
        any_grid: it holds codes of every grid.
    """

    name: str
    bits: tuple[int, ...] = (2, 3, 4, 8)
    group_sizes: tuple[int, ...] = ()
    uniform_group: bool = False
    mixed: bool = True
    multiple: int = 1
    zero_min: int = 0
    scale_dtypes: tuple[str, ...] = ()
    linear_only: bool = False
    head: bool = False
    whole_experts: bool = False
    file_type: str = ""
    any_grid: bool = False

    def takes_group(self, group_size: int) -> bool:
        return not self.group_sizes or group_size in self.group_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """The fate of one layer: a spec, or kept with the reason why."""

    shape: LayerShape
    spec: WeightSpec | None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlan:
    """A block's path and the fate of its layers."""

    path: str
    layers: tuple[LayerPlan, ...]

    @property
    def prefix(self) -> str:
        """What the paths of its layers begin with."""
        return f"{self.path}." if self.path else ""

    @property
    def title(self) -> str:
        """Its path, or those of its first layers where it has none."""
        names = list(self.specs)
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return self.path or ", ".join(names[:_NAMED]) + more

    @property
    def specs(self) -> dict[str, WeightSpec]:
        """Path relative to the block -> spec, for the layers that are quantized."""
        return {
            layer.shape.path.removeprefix(self.prefix): layer.spec for layer in self.layers if layer.spec is not None
        }

    @property
    def weights(self) -> int:
        """How many are quantized."""
        return sum(each.shape.out_features * each.shape.in_features for each in self.layers if each.spec is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The fate of every layer of a model.

    Attributes:
        spec: what most layers get; ``group_size`` here is what configuration files name.
        blocks: in call order.
        outside: layers outside the blocks.
        notes: decisions worth telling the user, one line each.
        absent: paths of modules in the checkpoint that the model does not have, whose weights are copied.
    """

    architecture: str
    spec: WeightSpec
    blocks: tuple[BlockPlan, ...]
    outside: tuple[LayerPlan, ...]
    notes: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[BlockPlan, ...]:
        """What codes are made, journaled and written by: the blocks and, as one more of an empty path, the quantized
        layers outside them, if there are any."""
        outside = tuple(layer for layer in self.outside if layer.spec is not None)
        return (*self.blocks, BlockPlan(path="", layers=outside)) if outside else self.blocks

    @property
    def layers(self) -> dict[str, LayerPlan]:
        """Every layer by path."""
        inside = (layer for block in self.blocks for layer in block.layers)
        return {layer.shape.path: layer for layer in (*inside, *self.outside)}

    @property
    def specs(self) -> dict[str, WeightSpec]:
        """Path -> spec of every quantized layer."""
        return {path: layer.spec for path, layer in self.layers.items() if layer.spec is not None}


def with_extra(plan: Plan, extra: Sequence[str]) -> Plan:
    """A plan that tells what becomes of tensors of modules that the model does not have.

    Args:
        plan: of the model.
        extra: their names in the checkpoint.
    """
    if not extra:
        return plan
    fate = "have no place in a GGUF file" if isinstance(plan.spec, GgufSpec) else "are copied unchanged"
    note = f"{len(extra)} tensors that {plan.architecture} does not have, such as {extra[0]}, {fate}"
    return replace(plan, notes=(*plan.notes, note))


def check_format(plan: Plan, rules: FormatRules) -> None:
    """Refuse a format that cannot hold what was planned without it.

    Raises:
        UsageError: names the layer.
    """
    if isinstance(plan.spec, GgufSpec) != bool(rules.file_type) and not rules.any_grid:
        found, needed = ("GGUF", "integer") if isinstance(plan.spec, GgufSpec) else ("integer", "GGUF")
        raise UsageError(f"format {rules.name}: found codes of {found} grids; needed {needed} ones; {_ADVICE}")
    if isinstance(plan.spec, GgufSpec):
        return
    check_spec(plan.spec, rules, f"format {rules.name}")
    for layer in plan.outside if not rules.head else ():
        if layer.spec is not None:
            raise UsageError(
                f"format {rules.name}: {layer.shape.path}: found a quantized "
                f"{'tower for images' if layer.shape.nontext else 'output head'}; needed one in 16 bits; "
                "use auto_round or fake"
            )
    for layer in plan.layers.values():
        if layer.spec is None:
            continue
        where = f"format {rules.name}: {layer.shape.path}"
        if reason := misfit(layer.shape, [rules]):
            raise UsageError(f"{where}: {reason}; {_ADVICE}")
        for name in ("bits", "group_size") if not rules.mixed else ():
            own, usual = getattr(layer.spec, name), getattr(plan.spec, name)
            if own != usual:
                raise UsageError(f"{where}: found {name} {own}; needed {usual} as elsewhere; {_MIXED}")
        assert isinstance(layer.spec, QuantSpec)  # as the plan's own
        check_spec(layer.spec, rules, where)
        check_group(layer.spec.group_size, rules, where)


def check_head(head: bool, rules: FormatRules) -> None:
    """Refuse to quantize the output head for a format that does not hold it.

    Raises:
        UsageError: names the format.
    """
    if head and not rules.head:
        raise UsageError(f"format {rules.name}: found --quant_lm_head; needed off; use auto_round")


def holds(plan: Plan, rules: FormatRules) -> bool:
    """Whether a format can hold what was planned; see ``check_format``."""
    try:
        check_format(plan, rules)
    except UsageError:
        return False
    return True


def check_spec(spec: QuantSpec, rule: FormatRules, where: str) -> None:
    """Refuse bits and scales that a format does not store.

    Raises:
        UsageError: begins with ``where``.
    """
    if spec.bits not in rule.bits:
        raise UsageError(f"{where}: found bits {spec.bits}; needed one of {', '.join(map(str, rule.bits))}")
    if rule.scale_dtypes and spec.scale_dtype not in rule.scale_dtypes:
        raise UsageError(f"{where}: found scale_dtype {spec.scale_dtype}; needed {' or '.join(rule.scale_dtypes)}")


def check_group(group_size: int, rule: FormatRules, where: str) -> None:
    """Refuse a group size that a format's loaders do not run.

    Raises:
        UsageError: begins with ``where``.
    """
    if not rule.takes_group(group_size):
        raise UsageError(
            f"{where}: found group_size {group_size}; needed one of {', '.join(map(str, rule.group_sizes))}"
        )


def left_alone(layer: LayerShape) -> LayerPlan:
    """The fate of a layer outside the blocks that is not quantized."""
    tied = f", tied to {layer.tied_to}" if layer.tied_to else ""
    where = "of images, not text: --quant_nontext_module quantizes it" if layer.nontext else f"outside the blocks{tied}"
    return LayerPlan(shape=layer, spec=None, reason=where)


def misfit(layer: LayerShape, rules: Sequence[FormatRules]) -> str:
    """Why some format cannot take a layer, whatever its spec; empty if all can."""
    if layer.fixed:
        return layer.fixed
    multiple = max((rule.multiple for rule in rules), default=1)
    if layer.in_features % multiple or layer.rows % multiple:
        return f"{layer.rows}x{layer.in_features} is not a multiple of {multiple}"
    if layer.whole and (refusing := [rule.name for rule in rules if not rule.whole_experts]):
        return f"its checkpoints hold all experts in one tensor, for which {refusing[0]} has no place"
    if not layer.linear and (refusing := [rule.name for rule in rules if rule.linear_only]):
        return f"it is a Conv1D, which {refusing[0]} does not take"
    return ""
