"""Transformer blocks as functions of their weights (``torch.func.functional_call`` on a meta copy of the block).

Legend: E experts of a stack, O output features of each, I input features.
"""

import copy
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoround.errors import ModelError
from autoround.func.rounding import prepare
from autoround.func.types import BlockWeights, Call
from autoround.spec import WeightSpec

# Attributes that differ between blocks of equal arithmetic.
POSITION_ATTRIBUTES = frozenset({"layer_idx", "layer_id", "layer_index"})
# torch's own bookkeeping on every module, and what the signature covers by other means.
_MODULE_STATE = frozenset(vars(nn.Module())) | {"training"}


@dataclass(frozen=True, eq=False, slots=True)
class BlockFn:
    """A block without weights: ``block_fn(tensors, call) -> hidden states``.

    Attributes:
        skeleton: the block's modules with every parameter and buffer on the meta device.
        signature: equal for blocks that compute the same function of their tensors; such blocks share a compiled step.
        transposed: names of weights that the module stores as (I, O), as GPT-2's Conv1D does, or as (E, I, O).
        stacks: name of a weight whose rows are those of many experts, (E * O, I) -> E; see ``stack_paths``.
    """

    skeleton: nn.Module
    signature: str
    transposed: frozenset[str]
    stacks: dict[str, int]

    def __call__(self, tensors: Mapping[str, Tensor], call: Call) -> Tensor:
        """Run the block.

        Args:
            tensors: every parameter and buffer by name relative to the block; linear weights as (O, I).
            call: the arguments of the block, hidden states included.

        Returns:
            The hidden states (B, T, D); further outputs of the block are dropped.
        """
        own = {}
        for name, tensor in tensors.items():
            experts = self.stacks.get(name)
            weight = tensor if experts is None else tensor.view(experts, -1, tensor.shape[-1])
            parameter = name if experts is None else name.removesuffix(".weight")
            own[parameter] = weight.mT if name in self.transposed else weight
        output = torch.func.functional_call(self.skeleton, own, call.args, call.kwargs)
        return output if isinstance(output, Tensor) else output[0]


def make_block_fn(block: nn.Module) -> BlockFn:
    """Lift a block to a function of its weights; the block itself is neither changed nor kept.

    >>> block = nn.Sequential(nn.Linear(4, 4))
    >>> block_fn = make_block_fn(block)
    >>> x = torch.ones(1, 2, 4)
    >>> torch.equal(block_fn(dict(block.state_dict()), Call((x,), {})), block(x))
    True
    """
    memo: dict[int, object] = {}
    for parameter in block.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in block.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    skeleton = copy.deepcopy(block, memo).eval()
    stacks = {f"{path}.weight": len(skeleton.get_parameter(path)) for path in stack_paths(skeleton)}
    return BlockFn(skeleton, _signature(skeleton), transposed_weights(skeleton), stacks)


def linear_paths(block: nn.Module) -> tuple[str, ...]:
    """Paths of the modules whose weights can be quantized, in definition order.

    >>> linear_paths(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    ('0', '2')
    """
    return tuple(path for path, module in block.named_modules() if isinstance(module, nn.Linear) or _is_conv1d(module))


def stack_paths(block: nn.Module) -> tuple[str, ...]:
    """Paths of the parameters that hold a matrix for each expert, in definition order.

    They are the 3-D parameters of modules that compute with experts, which say by ``is_transposed`` how these lie.
    Such a path stands for a layer whose weight ``<path>.weight`` has the rows of all experts, (E * O, I).

    >>> experts = nn.Module()
    >>> experts.is_transposed, experts.up = False, nn.Parameter(torch.ones(2, 3, 4))
    >>> stack_paths(nn.Sequential(experts))
    ('0.up',)
    """
    return tuple(
        f"{path}.{name}" if path else name
        for path, module in block.named_modules()
        if "is_transposed" in vars(module)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    )


def transposed_weights(block: nn.Module) -> frozenset[str]:
    """Names of the weights of layers whose modules store inputs first: (I, O), or (E, I, O) for experts.

    >>> experts = nn.Module()
    >>> experts.is_transposed, experts.up = True, nn.Parameter(torch.ones(2, 3, 4))
    >>> sorted(transposed_weights(nn.Sequential(experts, nn.Linear(2, 2))))
    ['0.up.weight']
    """
    linear = (path for path, module in block.named_modules() if _is_conv1d(module))
    stacks = (path for path in stack_paths(block) if block.get_submodule(path.rpartition(".")[0]).is_transposed)
    return frozenset(f"{path}.weight" for path in (*linear, *stacks))


def lay_out(block: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers as blocks are given them: linear weights (O, I), those of experts (E * O, I).

    Args:
        block: the module that they belong to, with or without data.
        tensors: by name, as the module has them.

    >>> experts = nn.Module()
    >>> experts.is_transposed, experts.up = True, nn.Parameter(torch.ones(2, 3, 4))
    >>> {name: tuple(tensor.shape) for name, tensor in lay_out(experts, dict(experts.named_parameters())).items()}
    {'up.weight': (8, 3)}
    """
    stacks, transposed = frozenset(stack_paths(block)), transposed_weights(block)
    found = {}
    for parameter, tensor in tensors.items():
        name = f"{parameter}.weight" if parameter in stacks else parameter
        weight = tensor.mT if name in transposed else tensor
        found[name] = weight.flatten(0, 1) if parameter in stacks else weight
    return found


def block_tensors(block: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a block by name, linear weights as (O, I), those of experts as (E * O, I).

    >>> {name: tuple(tensor.shape) for name, tensor in block_tensors(nn.Sequential(nn.Linear(4, 2))).items()}
    {'0.weight': (2, 4), '0.bias': (2,)}
    """
    own = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    return lay_out(block, {name: tensor.detach() for name, tensor in own.items()})


def split_weights(block: nn.Module, specs: Mapping[str, WeightSpec]) -> BlockWeights:
    """Separate the weights to tune from the rest of a block's tensors; see ``split_tensors``.

    >>> from autoround.spec import QuantSpec
    >>> weights = split_weights(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)), {"0": QuantSpec(group_size=4)})
    >>> list(weights.tuned), list(weights.frozen)
    (['0'], ['0.bias', '1.weight', '1.bias'])
    """
    return split_tensors(block_tensors(block), specs)


def split_tensors(tensors: Mapping[str, Tensor], specs: Mapping[str, WeightSpec]) -> BlockWeights:
    """Separate the weights to tune from the rest.

    Args:
        tensors: parameter or buffer name -> tensor; linear weights (O, I).
        specs: module path -> how its weight is stored.

    Raises:
        ModelError: a path has no weight, or its weight holds NaN or infinity; the message names the path.
        UsageError: a group_size does not fit.

    >>> from autoround.spec import QuantSpec
    >>> tensors = {"up.weight": torch.ones(2, 4), "up.bias": torch.ones(2)}
    >>> weights = split_tensors(tensors, {"up": QuantSpec(group_size=4)})
    >>> list(weights.tuned), list(weights.frozen)
    (['up'], ['up.bias'])
    """
    tuned = {}
    for path, spec in specs.items():
        if f"{path}.weight" not in tensors:
            raise ModelError(f"{path}: found no weight in the block; needed one of {', '.join(tensors)}")
        try:
            tuned[path] = prepare(tensors[f"{path}.weight"], spec)
        except ValueError as error:
            raise type(error)(f"{path}: {error}") from error
    frozen = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in tuned}
    return BlockWeights(tuned, frozen)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _signature(skeleton: nn.Module) -> str:
    """Digest of classes, tensor shapes and every non-tensor attribute but the block's position."""
    digest = hashlib.sha256()
    for path, module in skeleton.named_modules():
        digest.update(f"{path}:{type(module).__module__}.{type(module).__qualname__}".encode())
        for name in sorted(set(vars(module)) - _MODULE_STATE - POSITION_ATTRIBUTES):
            digest.update(f"{name}={_describe(vars(module)[name])}".encode())
        for name, tensor in _own_tensors(module):
            digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
    return digest.hexdigest()


def _own_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _describe(value: object) -> str:
    """Text of an attribute, without memory addresses."""
    if value is None or isinstance(value, str | int | float | complex | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        return "[" + ",".join(_describe(item) for item in value) + "]"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    attributes = getattr(value, "__dict__", {})
    return (
        f"{type(value).__qualname__}{_describe({k: v for k, v in attributes.items() if k not in POSITION_ATTRIBUTES})}"
    )
