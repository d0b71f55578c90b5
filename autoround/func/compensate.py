"""Error-compensated rounding: what a column loses when it is rounded is made up for by the columns still to come.

This is GPTQ (arXiv 2210.17323, section 3) with the scales found beforehand, for each row the best of some, and columns
in descending order of their mean square, on any grid. The result is a weight, not codes: rounding it to nearest gives
the codes, and tuning can go on from it.

Legend: O output features, I input features, G groups in a row, S columns in a group, L columns of a lump.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from autoround.errors import ModelError
from autoround.func.rounding import grid_of
from autoround.func.types import Params, Prepared, RoundingParams
from autoround.spec import WeightSpec

# Added to the Hessian's diagonal, relative to its mean.
DAMPING = 0.01
# Columns that are rounded one after another before the rest is updated by one product.
LUMP = 128
# How much of what clips take off the full range they take off as candidates.
CLIP_PARTS = (1.0, 0.5, 0.0)


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


def round_in_turn(columns: Columns, spec: WeightSpec) -> Tensor:
    """Change every column to what it is when its turn to be rounded comes.

    Returns:
        float32 (O,), what each row of the layer's output loses: ``e @ H @ e`` of its error ``e`` by the damped Hessian.

    >>> from autoround.spec import QuantSpec
    >>> ones_IO, factor_II = torch.ones(2, 1), torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    >>> columns = Columns(torch.tensor([[1.25], [1.0]]), ones_IO, 0 * ones_IO, factor_II)
    >>> round_in_turn(columns, QuantSpec(bits=4, group_size=2)).tolist()
    [0.078125]
    >>> columns.weight_IO.flatten().tolist()  # the first loses 0.25
    [1.25, 0.875]
    """
    (weight_IO, scale_IO, shift_IO, factor_II), grid = columns, grid_of(spec)
    loss_O = weight_IO.new_zeros(weight_IO.shape[1])
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
        loss_O += error_LO.square_().sum(0)
    return loss_O


def compensate(
    tuned: Mapping[str, Prepared],
    candidates: Sequence[Params],
    hessians: Mapping[str, Tensor],
    specs: Mapping[str, WeightSpec],
    *,
    rounding: Callable[[Columns, WeightSpec], Tensor] = round_in_turn,
) -> tuple[dict[str, Prepared], Params]:
    """Move every weight whose Hessian is known so that rounding to nearest keeps the layer's output.

    Clips that round single weights best need not be best where columns make up for each other, so that every row takes
    those of the candidates with which its output loses least.

    Args:
        tuned: layer path -> weight.
        candidates: clips to choose from, which decide the scales; offsets do not count, and are those of the first.
        hessians: layer path -> float32 (I, I), mean outer product of its inputs; layers that are given the same tensor
            are computed together.
        specs: layer path -> how its weight is stored.
        rounding: changes the columns and tells what rows lose; whoever counts memory leaves out what takes long.

    Returns:
        Weights, and their parameters: the first candidate's where no Hessian is known.

    Raises:
        ModelError: a Hessian is not finite.

    >>> from autoround.func.rounding import fake_quantize, nearest, prepare
    >>> from autoround.spec import QuantSpec
    >>> spec, weight_OI = QuantSpec(bits=2, group_size=4), torch.tensor([[-2.0, 0.4, 0.4, 0.4]])
    >>> prepared, hessian_II = prepare(weight_OI, spec), torch.ones(4, 4) + torch.eye(4)
    >>> moved, _ = compensate({"up": prepared}, [{"up": nearest(prepared)}], {"up": hessian_II}, {"up": spec})
    >>> [fake_quantize(each, nearest(prepared), spec).sum().item() for each in (prepared, moved["up"])]
    [-2.0, -1.0]
    """
    together: dict[tuple[int, WeightSpec], list[str]] = {}
    for path in tuned:
        if path in hessians:
            together.setdefault((id(hessians[path]), specs[path]), []).append(path)
    moved, params = dict(tuned), dict(candidates[0])
    for (_, spec), paths in together.items():
        whole = Prepared(*map(torch.cat, zip(*(tuned[path] for path in paths), strict=True)))
        clips = [[torch.cat([own[path][field] for path in paths]) for field in (1, 2)] for own in candidates]
        found = _best_rows(whole, clips, hessians[paths[0]], spec, rounding)
        sizes = [len(tuned[path].weight_OGS) for path in paths]
        for path, weight_OGS, *ends in zip(paths, *(torch.split(each, sizes) for each in found), strict=True):
            moved[path] = tuned[path]._replace(weight_OGS=weight_OGS)
            params[path] = RoundingParams(params[path].offset_OGS, *ends)
    return moved, params


def relaxed(params: Params) -> list[Params]:
    """Candidates for ``compensate``: clips that were found, full ranges, and what lies in the middle.

    >>> clips = {"up": RoundingParams(torch.zeros(1), torch.tensor([0.5]), torch.tensor([1.0]))}
    >>> [own["up"].clip_min_OG.item() for own in relaxed(clips)]
    [0.5, 0.75, 1.0]
    """
    return [
        {path: RoundingParams(offset, *(1 - part * (1 - clip) for clip in ends)) for path, (offset, *ends) in
         params.items()} for part in CLIP_PARTS
    ]  # fmt: skip


def _best_rows(
    tuned: Prepared,
    candidates: Sequence[Sequence[Tensor]],
    hessian_II: Tensor,
    spec: WeightSpec,
    rounding: Callable[[Columns, WeightSpec], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Each column as it was when its turn to be rounded came, and each row's clips."""
    grid, size = grid_of(spec), tuned.weight_OGS.shape[-1]
    order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
    back_I, factor_II = order_I.argsort(), _inverse_factor(hessian_II[order_I][:, order_I])
    weight_OGS = clip_min_OG = clip_max_OG = least_O = torch.empty(0)
    for ends in candidates:
        scale_OG, shift_OG = grid.scales(tuned, RoundingParams(tuned.lo_OG, *ends), spec)
        scale_IO, shift_IO = (each.T[order_I // size] for each in (scale_OG, shift_OG))
        weight_IO = rearrange(tuned.weight_OGS, "o g s -> (g s) o")[order_I]
        loss_O = rounding(Columns(weight_IO, scale_IO, shift_IO, factor_II), spec)
        found_OGS = rearrange(weight_IO[back_I], "(g s) o -> o g s", s=size).contiguous()
        if not len(least_O):
            weight_OGS, clip_min_OG, clip_max_OG, least_O = found_OGS, *(end.clone() for end in ends), loss_O
            continue
        better_O = loss_O < least_O
        for own, other in zip((weight_OGS, clip_min_OG, clip_max_OG, least_O), (found_OGS, *ends, loss_O), strict=True):
            own[better_O] = other[better_O]
    return weight_OGS, clip_min_OG, clip_max_OG


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
