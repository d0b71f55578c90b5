"""Matrix products on packed codes that torch ships, and how each of them lays out a weight.

A kernel stores tiles of R output features and C input features one after another, along the inputs first, two codes
in a byte. The order within a tile depends on the machine and is told by nobody, so it is found by packing the numbers
of the places. A kernel is used after it has reproduced a small layer on the device at hand.

Legend: O output features, I input features, G groups in a row, M rows of x, P places in a tile.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

# Group sizes that the kernels know. Larger groups are given to them in pieces.
_GROUPS = (256, 128, 64, 32)


class Kernel(NamedTuple):
    """A product of bfloat16 rows with codes below 16.

    Attributes:
        device: type of the devices it runs on.
        rows: output features of a tile; a layer's must be a multiple.
        columns: input features of a tile; a layer's must be a multiple.
        max_batch: rows of x up to which it is used; beyond, to dequantize once and multiply is faster.
        convert: int32 codes (O, I) -> tiles, whose first dimension is proportional to O.
        multiply: bfloat16 x (M, I), tiles, group size, table (G, O, 2) -> bfloat16 (M, O).
        places_P: int64, where to find each code of a tile among its low, then its high halves of bytes; None in order.
    """

    device: str
    rows: int
    columns: int
    max_batch: int
    convert: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, int, Tensor], Tensor]
    places_P: Tensor | None = None

    def fits(self, out_features: int, in_features: int) -> bool:
        """Whether a weight divides into tiles."""
        return out_features % self.rows == 0 and in_features % self.columns == 0

    def takes(self, x: Tensor) -> bool:
        """Whether it multiplies x (…, I), and is the fastest way to. It has no gradient."""
        if x.dtype != torch.bfloat16 or x.device.type != self.device or (x.requires_grad and torch.is_grad_enabled()):
            return False
        return 0 < x.numel() // x.shape[-1] <= self.max_batch

    def pack(self, codes_IO: Tensor) -> Tensor:
        """Tiles of integers (I, O) below 16: what ``convert`` returns, five times as fast where codes are in order."""
        if self.places_P is not None or self.columns > 1:
            return self.convert(codes_IO.t().int().contiguous())
        low, high = codes_IO.to(torch.uint8).view(len(codes_IO), -1, 2, self.rows // 2).unbind(2)
        return high.bitwise_left_shift(4).bitwise_or_(low).transpose(0, 1).reshape(-1, len(codes_IO) // 2)

    def unpack(self, tiles: Tensor, in_features: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Undo ``pack`` for a range of tiles along O: a new tensor (I, O)."""
        octets = tiles.view(torch.uint8).reshape(-1, in_features // self.columns, self.rows * self.columns // 2)
        codes = torch.cat((octets.bitwise_and(15), octets.bitwise_right_shift(4)), -1)
        if self.places_P is not None:
            codes = codes.index_select(-1, self.places_P.to(codes.device))
        codes = codes.view(*codes.shape[:2], self.rows, self.columns).permute(1, 3, 0, 2)
        return codes.to(dtype, memory_format=torch.contiguous_format).reshape(in_features, -1)


def _convert_cpu(codes_OI: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI, 1)
    return packed


def _multiply_cpu(x_MI: Tensor, tiles: Tensor, group: int, table_GO2: Tensor) -> Tensor:
    y_MO: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_MI, tiles, group, table_GO2)
    return y_MO


def _convert_cuda(codes_OI: Tensor) -> Tensor:
    pairs = codes_OI[:, ::2].bitwise_left_shift(4).bitwise_or(codes_OI[:, 1::2]).to(torch.uint8)
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    return packed


def _multiply_cuda(x_MI: Tensor, tiles: Tensor, group: int, table_GO2: Tensor) -> Tensor:
    y_MO: Tensor = torch.ops.aten._weight_int4pack_mm(x_MI, tiles, group, table_GO2)
    return y_MO


# Measured on an EPYC with AVX512-BF16: in bfloat16 the kernel is faster than dequantizing up to 60 to 100 rows. In
# float32 and float16 torch has only scalar loops for x86 (2048 x 2048, 512 rows: 3 to 4 s; dense float32: 24 ms), so
# that other dtypes are not taken. The first entry is for AVX512, the second for AVX2. Builds and processors whose order
# is neither's use scalar loops, or have not been measured (ARM), and get no kernel.
# The entry for CUDA has not been run on hardware; its limit is one tile of the tensor cores.
_KERNELS = (
    *(Kernel("cpu", rows, 1, 64, _convert_cpu, _multiply_cpu) for rows in (64, 32)),
    Kernel("cuda", 8, 128, 16, _convert_cuda, _multiply_cuda),
)


@cache
def find_kernel(device: torch.device) -> Kernel | None:
    """The kernel that works on a device, with the order of its codes; None where there is none.

    >>> find_kernel(torch.device("meta")) is None
    True
    """
    for kernel in _KERNELS:
        if kernel.device == device.type:
            try:
                ordered = _with_places(kernel, device)
                foreign = kernel.device == "cpu" and ordered.places_P is not None
                if not foreign and _is_right(ordered, device):
                    return ordered
            except (AttributeError, RuntimeError):  # this torch lacks the operator, or it lacks this device
                continue
    return None


def group_for(group_size: int) -> int | None:
    """The largest group of the kernels that divides a layer's; None where none does.

    >>> group_for(576), group_for(128), group_for(16)
    (64, 128, None)
    """
    return next((size for size in _GROUPS if group_size % size == 0), None)


def make_table(scale_GO: Tensor, zero_GO: Tensor, repeats: int) -> Tensor:
    """What the kernels compute a weight with: ``(q - 8) * table[..., 0] + table[..., 1]``.

    Args:
        scale_GO: float, of either sign.
        zero_GO: the true zero points.
        repeats: groups of the kernel in one of the layer.

    Returns:
        bfloat16 (G * repeats, O, 2). The second half follows the rounded scale, so that a weight of 0 stays small.

    >>> make_table(torch.tensor([[-0.5]]), torch.tensor([[7]]), 1).tolist()
    [[[-0.5, -0.5]]]
    """
    scale_GO = scale_GO.bfloat16()
    shift_GO = (scale_GO.float() * (8 - zero_GO.float())).bfloat16()
    return torch.stack((scale_GO, shift_GO), -1).repeat_interleave(repeats, 0)


def _with_places(kernel: Kernel, device: torch.device) -> Kernel:
    """Find the order of codes in a tile by packing the hexadecimal digits of the places' numbers."""
    places = kernel.rows * kernel.columns
    number = torch.arange(places, dtype=torch.int32, device=device).view(kernel.rows, kernel.columns)
    found = torch.zeros(places, dtype=torch.int64, device=device)
    plain = kernel._replace(places_P=None)
    for shift in (0, 4, 8):
        tile = number.bitwise_right_shift(shift).bitwise_and(15)
        halves = plain.convert(torch.cat((tile, tile), 1)).view(torch.uint8).flatten()[: places // 2]
        digits = torch.cat((halves.bitwise_and(15), halves.bitwise_right_shift(4)))
        found += digits.long() << shift
    order = found.argsort()
    in_order = torch.equal(order, torch.arange(places, device=device))
    return plain if in_order else kernel._replace(places_P=order)


def _is_right(kernel: Kernel, device: torch.device) -> bool:
    """Whether packing can be undone, and the product is what it should be, on a layer of a few tiles."""
    rows, columns = 2 * kernel.rows, max(256, 2 * kernel.columns)
    codes_OI = (torch.arange(rows * columns, dtype=torch.int32, device=device) * 7919 // 64 % 16).view(rows, columns)
    scale_GO = (torch.arange(columns // 32 * rows, device=device) % 13 - 6.5).view(-1, rows) / 64
    zero_GO = torch.arange(columns // 32 * rows, device=device).view(-1, rows) % 16
    x_MI = torch.linspace(-1, 1, 5 * columns, device=device).view(5, columns).bfloat16()
    tiles = kernel.pack(codes_OI.t())
    y_MO = kernel.multiply(x_MI, tiles, 32, make_table(scale_GO, zero_GO, 1))
    group_I = torch.arange(columns, device=device) // 32
    weight_IO = (codes_OI.t() - zero_GO[group_I]) * scale_GO[group_I]
    bound_MO = (x_MI.float().abs() @ weight_IO.abs()) / 64
    packed = torch.equal(tiles, kernel.convert(codes_OI))
    unpacked = torch.equal(kernel.unpack(tiles, columns).int(), codes_OI.t())
    return packed and unpacked and bool(((y_MO.float() - x_MI.float() @ weight_IO).abs() <= bound_MO).all())
