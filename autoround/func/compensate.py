"""Error-compensated rounding: what a column loses when it is rounded is made up for by the columns still to come.

This is GPTQ (arXiv 2210.17323, section 3) with the scales found beforehand and columns in descending order of their
mean square, on any grid. The result is a weight, not codes: rounding it to nearest gives the codes, and tuning can go
on from it. Where it does not, and codes are of few bits, their scales are then fitted again to the codes.

Legend: O output features, I input features, G groups in a row, S columns in a group, L columns of a lump.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from autoround.errors import ModelError
from autoround.func.rounding import dequantize, grid_of
from autoround.func.scales import FACTOR_RANGE, store_scales
from autoround.func.types import Codes, IntCodes, Params, Prepared
from autoround.spec import QuantSpec, WeightSpec

# Added to the Hessian's diagonal, relative to its mean.
DAMPING = 0.01
# Columns that are rounded one after another before the rest is updated by one product.
LUMP = 128
# Numbers of an array that is held while scales are solved for, some rows at a time.
SOLVED = 2**24
# Added to the diagonal of what is solved, relative to its mean: codes of a group may all be 0.
RIDGE = 1e-6
# Widest codes whose scales are fitted again: of 4 bits, it was no gain for a model whose weights lie near such a grid.
REFITTED_BITS = 3


class Columns(NamedTuple):
    """Columns in the order in which they are rounded.

    Attributes:
        weight_IO: a column a row.
        scale_IO, shift_IO: of each weight.
        factor_II: upper Cholesky factor of the inverse of the damped Hessian.
    """

    weight_IO: Tensor
    scale_IO: Tensor
    shift_IO: Tensor
    factor_II: Tensor


def round_in_turn(columns: Columns, spec: WeightSpec) -> None:
    """Change every column to what it is when its turn to be rounded comes.

    >>> from autoround.spec import QuantSpec
    >>> ones_IO, factor_II = torch.ones(2, 1), torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    >>> columns = Columns(torch.tensor([[1.25], [1.0]]), ones_IO, 0 * ones_IO, factor_II)
    >>> round_in_turn(columns, QuantSpec(bits=4, group_size=2))
    >>> columns.weight_IO.flatten().tolist()  # the first loses 0.25
    [1.25, 0.875]
    """
    (weight_IO, scale_IO, shift_IO, factor_II), grid = columns, grid_of(spec)
    for start in range(0, len(weight_IO), LUMP):
        lump_LO, factor_LI = weight_IO[start : start + LUMP], factor_II[start : start + LUMP]
        error_LO = torch.empty_like(lump_LO)
        for row in range(len(lump_LO)):
            own = scale_IO[start + row, :, None], shift_IO[start + row, :, None]
            q_O11 = grid.round_codes(lump_LO[row, :, None, None], 0.0, *own, spec)
            lost_O = lump_LO[row] - grid.values(q_O11, *own, spec).flatten()
            error_LO[row] = lost_O / factor_LI[row, start + row]
            lump_LO[row + 1 :].addr_(factor_LI[row, start + row + 1 : start + len(lump_LO)], error_LO[row], alpha=-1)
        weight_IO[start + LUMP :].addmm_(factor_LI[:, start + LUMP :].T, error_LO, alpha=-1)


def compensate(
    tuned: Mapping[str, Prepared],
    params: Params,
    hessians: Mapping[str, Tensor],
    specs: Mapping[str, WeightSpec],
    *,
    rounding: Callable[[Columns, WeightSpec], None] = round_in_turn,
) -> dict[str, Prepared]:
    """Move every weight whose Hessian is known so that rounding to nearest keeps the layer's output.

    Args:
        tuned: layer path -> weight.
        params: their clips, which decide the scales; offsets do not count.
        hessians: layer path -> float32 (I, I), mean outer product of its inputs; layers that are given the same tensor
            are computed together.
        specs: layer path -> how its weight is stored.
        rounding: changes the columns; whoever counts memory leaves out what takes long.

    Raises:
        ModelError: a Hessian is not finite.

    >>> from autoround.func.rounding import fake_quantize, nearest, prepare
    >>> from autoround.spec import QuantSpec
    >>> spec, weight_OI = QuantSpec(bits=2, group_size=4), torch.tensor([[-2.0, 0.4, 0.4, 0.4]])
    >>> prepared, hessian_II = prepare(weight_OI, spec), torch.ones(4, 4) + torch.eye(4)
    >>> moved = compensate({"up": prepared}, {"up": nearest(prepared)}, {"up": hessian_II}, {"up": spec})
    >>> [fake_quantize(each, nearest(prepared), spec).sum().item() for each in (prepared, moved["up"])]
    [-2.0, -1.0]
    """
    together: dict[tuple[int, WeightSpec], list[str]] = {}
    for path in tuned:
        if path in hessians:
            together.setdefault((id(hessians[path]), specs[path]), []).append(path)
    moved = dict(tuned)
    for (_, spec), paths in together.items():
        grids = [grid_of(spec).scales(tuned[path], params[path], spec) for path in paths]
        scale_OG, shift_OG = map(torch.cat, zip(*grids, strict=True))
        weight_OGS = torch.cat([tuned[path].weight_OGS for path in paths])
        own_OGS = _compensated(weight_OGS, (scale_OG, shift_OG), hessians[paths[0]], spec, rounding)
        parts = torch.split(own_OGS, [len(tuned[path].weight_OGS) for path in paths])
        moved |= {path: tuned[path]._replace(weight_OGS=part) for path, part in zip(paths, parts, strict=True)}
    return moved


def _compensated(
    weight_OGS: Tensor,
    grid_OG: tuple[Tensor, Tensor],
    hessian_II: Tensor,
    spec: WeightSpec,
    rounding: Callable[[Columns, WeightSpec], None],
) -> Tensor:
    """Each column as it was when its turn to be rounded came."""
    size = weight_OGS.shape[-1]
    order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
    factor_II = _inverse_factor(hessian_II[order_I][:, order_I])
    weight_IO = rearrange(weight_OGS, "o g s -> (g s) o")[order_I]
    scale_IO, shift_IO = (each.T[order_I // size] for each in grid_OG)
    rounding(Columns(weight_IO, scale_IO, shift_IO, factor_II), spec)
    back_I = order_I.argsort()
    return rearrange(weight_IO[back_I], "(g s) o -> o g s", s=size).contiguous()


def _inverse_factor(hessian_II: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped inverse; channels that are never used count as used a little.

    It is the inverse of the factor of the Hessian with rows and columns in reverse, itself in reverse, so that nothing
    is factored twice. A Hessian that rounding made indefinite is damped more.
    """
    mean, damping = float(hessian_II.diagonal().mean()), DAMPING
    if not math.isfinite(mean):
        raise ModelError(f"Hessian: found a mean square of {mean}; needed finite inputs; check the weights and data")
    failed = True
    while failed:
        damped_II = hessian_II.flip(0, 1)
        damped_II.diagonal().add_(damping * mean if mean else 1.0)
        factor_II, info = torch.linalg.cholesky_ex(damped_II)
        failed, damping = bool(info), 10 * damping
    one_II = torch.eye(len(factor_II), device=factor_II.device)
    inverse_II: Tensor = torch.linalg.solve_triangular(factor_II, one_II, upper=False)
    return inverse_II.flip(0, 1)


def refits(spec: WeightSpec) -> bool:
    """Whether the scales of compensated codes are fitted again: where codes are few.

    >>> from autoround.spec import GgufSpec, QuantSpec
    >>> [refits(spec) for spec in (QuantSpec(bits=3), QuantSpec(bits=4), GgufSpec(type="q2_k"))]
    [True, False, False]
    """
    return isinstance(spec, QuantSpec) and spec.bits <= REFITTED_BITS


def refit_scales(
    tuned: Mapping[str, Prepared],
    codes: Mapping[str, Codes],
    hessians: Mapping[str, Tensor],
    specs: Mapping[str, WeightSpec],
) -> dict[str, Codes]:
    """Give codes the scales with which they, as they are, keep their layer's output best: least squares.

    A row's output is linear in its scales, so that its error is a quadratic form of them by the Hessian, damped as for
    ``compensate``; all groups of a row are solved for together. A row that would not gain keeps its scales.

    Args:
        tuned: layer path -> weight before any compensation, of the layers to refit (``refits``).
        codes: layer path -> integer codes.
        hessians: layer path -> float32 (I, I), as for ``compensate``.
        specs: layer path -> how its weight is stored.

    Returns:
        Codes of the layers in ``tuned``.

    Raises:
        TypeError: a layer is stored in blocks of a GGUF type.

    >>> from autoround.func.rounding import prepare
    >>> from autoround.func.types import IntCodes
    >>> spec = QuantSpec(bits=2, group_size=2)
    >>> tuned = {"up": prepare(torch.tensor([[1.2, -1.2]]), spec)}
    >>> codes = {"up": IntCodes(torch.tensor([[3, 1]]), torch.tensor([[1.0]]), torch.tensor([[2]]))}
    >>> refit_scales(tuned, codes, {"up": torch.eye(2)}, {"up": spec})["up"].scale_OG
    tensor([[1.2000]])
    """
    factors = {}
    for path, prepared in tuned.items():
        own = codes[path]
        if not isinstance(own, IntCodes):
            raise TypeError(f"{path}: found {type(own).__name__}; needed IntCodes; ask refits() first")
        factor_OG = _best_factors(prepared.weight_OGS, dequantize(own, specs[path]), hessians[path])
        kept_OG = torch.isfinite((own.scale_OG.float() * factor_OG).to(own.scale_OG.dtype))
        factors[path] = {"scale_OG": torch.where(kept_OG, factor_OG, 1.0)}
    return store_scales({path: codes[path] for path in tuned}, factors)


def _best_factors(weight_OGS: Tensor, rounded_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """Factors of a rounded weight's groups that bring its product with the inputs closest to the weight's own."""
    _, groups, size = weight_OGS.shape
    damped_II = hessian_II.clone()
    damped_II.diagonal().add_(DAMPING * hessian_II.diagonal().mean())
    damped_GSI = damped_II.view(groups, size, -1)
    factors = []
    rows = max(1, SOLVED // max(groups * size, groups * groups))
    parts = (torch.split(each, rows) for each in (rounded_OI.view_as(weight_OGS), weight_OGS))
    for own_OGS, float_OGS in zip(*parts, strict=True):
        form_OGG, aim_OG = (own_OGS.new_empty(len(own_OGS), *shape) for shape in ((groups, groups), (groups,)))
        for group in range(groups):
            product_OGS = (own_OGS[:, group] @ damped_GSI[group]).view_as(own_OGS)
            form_OGG[:, group] = (product_OGS * own_OGS).sum(-1)
            aim_OG[:, group] = (product_OGS * float_OGS).sum((1, 2))
        factors.append(_least(form_OGG, aim_OG))
    return torch.cat(factors)


def _least(form_OGG: Tensor, aim_OG: Tensor) -> Tensor:
    """Of each row the factors f with the least ``f @ form @ f - 2 * aim @ f``, or ones where others gain nothing."""
    # what has no say in the output keeps its scale
    ridge_O = RIDGE * form_OGG.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float32).tiny
    solvable_OGG = form_OGG + torch.diag_embed(ridge_O[:, None].expand_as(aim_OG))
    found_OG, _ = torch.linalg.solve_ex(solvable_OGG, aim_OG + ridge_O[:, None])
    found_OG, one_OG = found_OG.clamp(*FACTOR_RANGE), torch.ones_like(aim_OG)

    def error_O(factor_OG: Tensor) -> Tensor:
        return torch.einsum("og,ogk,ok->o", factor_OG, form_OGG, factor_OG) - 2 * (aim_OG * factor_OG).sum(1)

    better_O = error_O(found_OG) < error_O(one_OG)  # what is not finite is not better
    return torch.where(better_O[:, None], found_OG, one_OG)
