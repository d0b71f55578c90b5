"""The tensors that the GPTQ family of layouts shares: qweight, qzeros and scales.

Legend: O output features, I input features, G groups in a row.

| name    | dtype       | shape              |
|---------|-------------|--------------------|
| qweight | int32       | (I * bits / 32, O) |
| qzeros  | int32       | (G, O * bits / 32) |
| scales  | scale dtype | (G, O)             |
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from autoround.errors import FormatError
from autoround.formats.bits import pack_stream, unpack_stream
from autoround.formats.layer_names import Name, absent, named
from autoround.func.types import IntCodes
from autoround.plan import Plan
from autoround.resolve import FUSED
from autoround.spec import QuantSpec


def pack_layer(codes: IntCodes, spec: QuantSpec, *, zero_offset: int) -> dict[str, Tensor]:
    """Pack one layer.

    Args:
        codes: O and I are multiples of 32.
        spec: how they were made.
        zero_offset: subtracted from zero points in the file: 1 in version 1 of the layout, else 0.

    Raises:
        FormatError: a zero point is below ``zero_offset``.
    """
    if int(codes.zero_OG.min()) < zero_offset:
        count = int((codes.zero_OG < zero_offset).sum())
        raise FormatError(
            f"found {count} zero points of 0; needed at least {zero_offset}, because this layout stores zero - 1; "
            "use gptq_v2 or auto_round, or name this format when the run begins"
        )
    return {
        "qweight": pack_stream(codes.q_OI, spec.bits).t().contiguous(),
        "qzeros": pack_stream(codes.zero_OG.t() - zero_offset, spec.bits),
        "scales": codes.scale_OG.t().contiguous(),
    }


def unpack_layer(tensors: Mapping[str, Tensor], spec: QuantSpec, *, zero_offset: int) -> IntCodes:
    """Undo ``pack_layer`` for the same arguments, on the CPU."""
    return IntCodes(
        q_OI=unpack_stream(tensors["qweight"].t(), spec.bits),
        scale_OG=tensors["scales"].t(),
        zero_OG=(unpack_stream(tensors["qzeros"], spec.bits).to(torch.int16) + zero_offset).to(torch.uint8).t(),
    )


def check_half_scales(codes: IntCodes) -> None:
    """Refuse scales that GPTQ and AWQ loaders do not take.

    Raises:
        FormatError: scales are not float16.
    """
    if codes.scale_OG.dtype != torch.float16:
        raise FormatError(f"found {codes.scale_OG.dtype} scales; needed float16; use --scale_dtype float16")


def exclusions(names: Iterable[Name]) -> dict[str, dict[str, Any]]:
    """The ``dynamic`` setting of a quantization config that leaves layers out, as GPTQModel reads it.

    >>> exclusions([Name("lm_head", "lm_head")])
    {'-:^lm_head$': {}}
    """
    return {f"-:^{name.pattern}$": {} for name in names}


def settings(spec: QuantSpec) -> dict[str, Any]:
    """A layer's storage as the configurations of these layouts name it.

    >>> settings(QuantSpec(bits=8, group_size=32))
    {'bits': 8, 'group_size': 32, 'sym': True}
    """
    return {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.sym}


def overrides(plan: Plan) -> dict[str, dict[str, Any]]:
    """The ``dynamic`` setting for layers that are kept or differ from the plan's spec: inside the blocks, and of
    modules that the model does not have.

    vLLM asks for layers that it runs as one by a name of its own.
    """
    usual, dynamic = settings(plan.spec), exclusions(absent(plan))
    fates = ((layer.shape, layer.spec and settings(layer.spec)) for block in plan.blocks for layer in block.layers)
    for name, own in named(fates):
        if own is None:
            dynamic |= exclusions([name])
        elif own != usual:
            dynamic[f"+:^{name.pattern}$"] = own
    for path, layer in plan.layers.items():
        parent, _, last = path.rpartition(".")
        for joined, members in FUSED.items():
            own = [dynamic.get(f"+:^{re.escape(f'{parent}.{member}')}$") for member in members]
            if layer.spec and last == members[0] and own[0] and all(each == own[0] for each in own):
                dynamic[f"+:^{re.escape(f'{parent}.{joined}')}$"] = own[0]
    return dynamic


def g_idx(codes: IntCodes, spec: QuantSpec) -> Tensor:
    """Group of every column, int32 (I,)."""
    columns = codes.q_OI.shape[1]
    return torch.arange(columns, dtype=torch.int32) // spec.group_of(columns)


def check_g_idx(g_idx_I: Tensor, spec: QuantSpec) -> None:
    """Refuse columns out of order.

    Raises:
        FormatError: ``g_idx`` is not ``column // group_size``.
    """
    group = spec.group_of(len(g_idx_I))
    if g_idx_I.tolist() != [column // group for column in range(len(g_idx_I))]:
        raise FormatError(f"found columns out of order in g_idx; needed column // {group}")
