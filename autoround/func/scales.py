"""The scales of rounded weights, tuned by a loss that lies beyond their block; codes stay as they are.

Once codes are chosen, a weight is linear in its scales, so that they can be learned end to end (E2E-QP of EfficientQAT,
arXiv 2407.11062, section 3.3). Here it is factors of them that are learned, 1 at first: one learning rate then suits
scales of any size. What has a scale is every floating-point field of a layer's codes, whatever their grid.

Legend: B samples in a batch, T tokens, D hidden size, G groups in a row, O output features.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from autoround.errors import ModelError
from autoround.func.rounding import dequantize
from autoround.func.types import BlockFunction, Call, Codes
from autoround.spec import WeightSpec

# How far a scale may go from the one that its codes were chosen for.
FACTOR_RANGE = (0.5, 2.0)

Factors: TypeAlias = dict[str, dict[str, Tensor]]


class RoundedBlock(NamedTuple):
    """A block after rounding.

    Attributes:
        codes: layer path relative to the block -> codes.
        frozen: all its other parameters and buffers by name, in the dtypes in which it computes.
    """

    codes: dict[str, Codes]
    frozen: dict[str, Tensor]


Apply: TypeAlias = Callable[[RoundedBlock, Factors, Call], Tensor]
Pull: TypeAlias = Callable[[RoundedBlock, Factors, Call, Tensor], tuple[Factors, Tensor]]


def init_factors(codes: Mapping[str, Codes]) -> Factors:
    """Factors that change nothing: layer path -> name of a field -> float32 ones of its shape.

    >>> from autoround.func.types import IntCodes
    >>> codes = {"up": IntCodes(torch.tensor([[0, 3]]), torch.tensor([[0.5]]), torch.tensor([[1]]))}
    >>> init_factors(codes)
    {'up': {'scale_OG': tensor([[1.]])}}
    """
    return {
        path: {name: torch.ones_like(field, dtype=torch.float32)
               for name, field in own._asdict().items() if field.is_floating_point()}
        for path, own in codes.items()
    }  # fmt: skip


def scaled(codes: Codes, factors: Mapping[str, Tensor]) -> Codes:
    """Codes of a layer with their scales multiplied, in float32.

    >>> from autoround.func.types import IntCodes
    >>> codes = IntCodes(torch.tensor([[0, 3]]), torch.tensor([[0.5]]), torch.tensor([[1]]))
    >>> scaled(codes, {"scale_OG": torch.tensor([[1.5]])}).scale_OG
    tensor([[0.7500]])
    """
    return codes._replace(**{name: getattr(codes, name).float() * factor for name, factor in factors.items()})


def store_scales(codes: Mapping[str, Codes], factors: Factors) -> dict[str, Codes]:
    """Codes with their scales multiplied and rounded to the dtypes in which they are stored.

    Raises:
        ModelError: a scale is beyond the range of its dtype; names the layer.

    >>> from autoround.func.types import IntCodes
    >>> codes = {"up": IntCodes(torch.tensor([[0, 3]]), torch.tensor([[0.5]]).half(), torch.tensor([[1]]))}
    >>> store_scales(codes, {"up": {"scale_OG": torch.tensor([[1.5]])}})["up"].scale_OG
    tensor([[0.7500]], dtype=torch.float16)
    """
    stored = {}
    for path, own in codes.items():
        found = scaled(own, factors[path])
        stored[path] = found._replace(
            **{name: getattr(found, name).to(getattr(own, name).dtype) for name in factors[path]}
        )
        for name in factors[path]:
            if not bool(torch.isfinite(getattr(stored[path], name)).all()):
                raise ModelError(
                    f"{path}: found a tuned scale beyond {getattr(own, name).dtype}; use fewer scale_steps "
                    "or another scale_dtype"
                )
    return stored


def rounded_tensors(
    block: RoundedBlock, factors: Factors, specs: Mapping[str, WeightSpec], dtype: torch.dtype
) -> dict[str, Tensor]:
    """All tensors of a block by name, those of layers made of their codes; differentiable in the factors.

    Args:
        block: what it has.
        factors: of the scales.
        specs: layer path relative to the block -> how its weight is stored.
        dtype: of the layers' weights.

    >>> from autoround.func.types import IntCodes
    >>> from autoround.spec import QuantSpec
    >>> codes = {"up": IntCodes(torch.tensor([[0, 3]]), torch.tensor([[0.5]]), torch.tensor([[1]]))}
    >>> specs, factors = {"up": QuantSpec(bits=2, group_size=2, sym=False)}, {"up": {"scale_OG": torch.tensor([[2.0]])}}
    >>> rounded_tensors(RoundedBlock(codes, {}), factors, specs, torch.float32)["up.weight"].tolist()
    [[-1.0, 2.0]]
    """
    weights = {f"{path}.weight": dequantize(scaled(own, factors[path]), specs[path]).to(dtype)
               for path, own in block.codes.items()}  # fmt: skip
    return {**block.frozen, **weights}


def make_apply(block_fn: BlockFunction, specs: Mapping[str, WeightSpec], *, dtype: torch.dtype) -> Apply:
    """Build ``(block, factors, call) -> hidden states``, traceable for blocks of equal signature.

    Args:
        block_fn: the lifted block.
        specs: layer path relative to the block -> how its weight is stored.
        dtype: of the layers' weights.

    >>> from autoround.func.block import make_block_fn
    >>> from autoround.func.types import IntCodes
    >>> from autoround.spec import QuantSpec
    >>> codes = {"0": IntCodes(torch.tensor([[0, 3]]), torch.tensor([[0.5]]), torch.tensor([[1]]))}
    >>> block_fn = make_block_fn(torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)))
    >>> apply = make_apply(block_fn, {"0": QuantSpec(bits=2, group_size=2, sym=False)}, dtype=torch.float32)
    >>> apply(RoundedBlock(codes, {}), init_factors(codes), Call((torch.ones(1, 1, 2),), {})).tolist()
    [[[0.5]]]
    """

    def apply(block: RoundedBlock, factors: Factors, call: Call) -> Tensor:
        return block_fn(rounded_tensors(block, factors, specs, dtype), call)

    return apply


def make_pull(block_fn: BlockFunction, specs: Mapping[str, WeightSpec], *, dtype: torch.dtype, hidden: int) -> Pull:
    """Build ``(block, factors, call, cotangent) -> (gradient of the factors, gradient of what flowed in)``.

    The block is run once more, so that nothing but what flowed into it needs to be kept.

    Args:
        block_fn: the lifted block.
        specs: layer path relative to the block -> how its weight is stored.
        dtype: of the layers' weights.
        hidden: which leaf of the call is what flows in.

    >>> from autoround.func.block import make_block_fn
    >>> from autoround.func.types import IntCodes
    >>> from autoround.spec import QuantSpec
    >>> codes = {"0": IntCodes(torch.tensor([[0, 3]]), torch.tensor([[0.5]]), torch.tensor([[1]]))}
    >>> block_fn = make_block_fn(torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)))
    >>> pull = make_pull(block_fn, {"0": QuantSpec(bits=2, group_size=2, sym=False)}, dtype=torch.float32, hidden=0)
    >>> call = Call((torch.ones(1, 1, 2),), {})
    >>> pull(RoundedBlock(codes, {}), init_factors(codes), call, torch.ones(1, 1, 1))
    ({'0': {'scale_OG': tensor([[0.5000]])}}, tensor([[[-0.5000,  1.0000]]]))
    """
    apply = make_apply(block_fn, specs, dtype=dtype)

    def pull(block: RoundedBlock, factors: Factors, call: Call, cotangent_BTD: Tensor) -> tuple[Factors, Tensor]:
        leaves, nesting = tree_flatten(call)

        def objective(own: Factors, x_BTD: Tensor) -> Tensor:
            arguments: Any = tree_unflatten([*leaves[:hidden], x_BTD, *leaves[hidden + 1 :]], nesting)
            return (apply(block, own, arguments).float() * cotangent_BTD.float()).sum()

        if torch.compiler.is_compiling():
            grads, pulled_BTD = torch.func.grad(objective, argnums=(0, 1))(factors, leaves[hidden])
            return grads, pulled_BTD
        return _gradients(objective, factors, leaves[hidden])

    return pull


def _gradients(objective: Callable[[Factors, Tensor], Tensor], factors: Factors, x: Tensor) -> tuple[Factors, Tensor]:
    """Of both arguments, by way of autograd, which takes blocks with an autograd.Function of their own too."""
    leaves, nesting = tree_flatten((factors, x))
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        value = objective(*tree_unflatten(leaves, nesting))
        found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    grads, pulled = tree_unflatten(list(found), nesting)
    return grads, pulled


def keep_near(factors: Factors) -> Factors:
    """Put factors back inside ``FACTOR_RANGE``.

    >>> keep_near({"up": {"scale_OG": torch.tensor([0.1, 1.1])}})
    {'up': {'scale_OG': tensor([0.5000, 1.1000])}}
    """
    found: Factors = tree_map(lambda factor: factor.clamp(*FACTOR_RANGE), factors)
    return found
