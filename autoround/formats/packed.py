"""Linear layers of quantized checkpoints, in plain torch on every device; they compute on packed GPTQ tensors.

Legend: O output features, I input features, G groups in a row.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autoround.formats import gptq_layout
from autoround.formats.bits import PERIOD, pack_stream
from autoround.formats.kernels import Kernel, find_kernel, group_for, make_table
from autoround.formats.stored import Stored
from autoround.spec import QuantSpec

# Codes dequantized at once on a CPU: enough to keep its threads busy, few enough to reuse memory that is mapped.
_PART = 2**23
# Output features of a part are a multiple of this, and so of the kernels' tiles and of the words' periods.
_STEP = 64
# Codes that kernels of 4 bits hold; 2 bits would take twice their memory.
_TILED_BITS = (3, 4)


class PackedLinear(nn.Module):
    """A linear layer whose weight stays packed.

    The weight is ``scale * (q - zero)`` in float32, dequantized part by part in every call, then cast to the input's
    dtype, which is also the output's. On a CPU float16 is computed in float32, which is faster there and no less exact.

    After ``finish``, weights of 3 and 4 bits are held as one of torch's kernels wants them, in place of ``qweight``;
    files and state dicts do not show it. The kernel multiplies up to a few dozen rows of bfloat16 that need no
    gradient; it rounds scales instead of weights to bfloat16.

    Attributes:
        qweight: int32 (I * bits / 32, O); None where ``tiles`` stands for it.
        qzeros: int32 (G, O * bits / 32), holding ``zero - zero_offset``.
        scales: float (G, O), of either sign; casting the module does not change them.
        g_idx: int32 (I,), group of every input column; None where columns are in order.
        reordered: whether ``g_idx`` must be followed because it is not ``column // (I / G)``.
        bias: (O,) or None.

    Args:
        tensors: the buffers by name, on any device; their shapes are the layer's.
        zero_offset: 1 where the file stores ``zero - 1``, else 0.
        bias: taken over as it is.

    >>> tensors = {"qweight": torch.full((4, 32), 0x11111111), "qzeros": torch.zeros(1, 4), "scales": torch.ones(1, 32)}
    >>> layer = PackedLinear({name: tensor.int() for name, tensor in tensors.items()}, zero_offset=0)
    >>> layer(torch.ones(32))[:3].tolist()
    [32.0, 32.0, 32.0]
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, zero_offset: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        for name in ("qweight", "qzeros", "scales"):
            self.register_buffer(name, tensors[name])
        self.register_buffer("g_idx", tensors.get("g_idx"))
        self.register_buffer("tiles", None, persistent=False)
        self.register_buffer("table", None, persistent=False)
        self.groups, self.out_features = self.scales.shape
        self.bits = self.qzeros.shape[1] * 32 // self.out_features
        self.in_features = tensors["qweight"].shape[0] * 32 // self.bits
        self.zero_offset = zero_offset
        self.reordered = False
        self.kernel: Kernel | None = None
        self.bias = bias

    qweight: Tensor | None
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None
    tiles: Tensor | None
    table: Tensor | None

    def finish(self) -> None:
        """Once the tensors are loaded: find out whether columns are in order, and hold the weight for a kernel."""
        if self.g_idx is not None:
            columns = torch.arange(self.in_features, device=self.g_idx.device)
            self.reordered = not torch.equal(self.g_idx, (columns // (self.in_features // self.groups)).int())
        kernel, group = find_kernel(self.scales.device), group_for(self.in_features // self.groups)
        if (
            kernel is None
            or group is None
            or kernel is self.kernel
            or self.reordered
            or self.bits not in _TILED_BITS
            or not kernel.fits(self.out_features, self.in_features)
        ):
            return
        parts = [kernel.pack(self._codes(*part)) for part in self._parts()]
        self.kernel, self.tiles, self.qweight = kernel, torch.cat(parts), None
        repeats = self.in_features // self.groups // group
        self.table = make_table(self.scales, self._zeros(0, self.out_features), repeats)

    def dequantize(self, first: int = 0, last: int | None = None) -> Tensor:
        """The weight of output features from ``first`` to ``last``, multiples of 64: float32 (I, last - first)."""
        last = self.out_features if last is None else last
        weight_IO = self._codes(first, last, torch.float32)
        zero_GO, scale_GO = self._zeros(first, last).float(), self.scales[:, first:last].float()
        if self.reordered and self.g_idx is not None:
            return weight_IO.sub_(zero_GO[self.g_idx]).mul_(scale_GO[self.g_idx])
        grouped = weight_IO.view(self.groups, -1, last - first)
        grouped.sub_(zero_GO.unsqueeze(1)).mul_(scale_GO.unsqueeze(1))
        return weight_IO

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) -> (…, O)."""
        if self.kernel is not None and self.kernel.takes(x):
            return self._multiply_tiles(x, self.kernel)
        if x.device.type == "cpu" and x.dtype == torch.float16:
            return self._multiply(x.float()).half()
        return self._multiply(x)

    def _multiply_tiles(self, x: Tensor, kernel: Kernel) -> Tensor:
        """Multiply without dequantizing."""
        assert self.tiles is not None and self.table is not None
        rows_MI = x.reshape(-1, self.in_features).contiguous()
        y_MO = kernel.multiply(rows_MI, self.tiles, self.in_features // len(self.table), self.table)
        y = y_MO.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _multiply(self, x: Tensor) -> Tensor:
        """Dequantize and multiply."""
        parts = []
        for first, last in self._parts() if x.device.type == "cpu" else [(0, self.out_features)]:
            bias = None if self.bias is None else self.bias[first:last].to(x.dtype)
            parts.append(nn.functional.linear(x, self.dequantize(first, last).to(x.dtype).t(), bias))
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def _parts(self) -> list[tuple[int, int]]:
        """Ranges of output features of about ``_PART`` codes each."""
        count = max(_STEP, _PART // self.in_features // _STEP * _STEP)
        return [(first, min(first + count, self.out_features)) for first in range(0, self.out_features, count)]

    def _codes(self, first: int, last: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """A new tensor of q, (I, last - first)."""
        if self.qweight is not None:
            return unpack_words(self.qweight[:, first:last], self.bits).to(dtype)
        assert self.tiles is not None and self.kernel is not None
        width = self.out_features // len(self.tiles)
        return self.kernel.unpack(self.tiles[first // width : last // width], self.in_features, dtype)

    def _zeros(self, first: int, last: int) -> Tensor:
        """Zero points, int32 (G, last - first)."""
        words = slice(first * self.bits // 32, last * self.bits // 32)
        return unpack_words(self.qzeros[:, words].t(), self.bits).t().contiguous() + self.zero_offset

    def _words(self) -> Tensor:
        """What ``qweight`` holds in a file, on the device of the layer."""
        parts = [pack_stream(self._codes(*part).t(), self.bits).t() for part in self._parts()]
        return torch.cat(parts, 1).contiguous().to(self.scales.device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tiles is not None:
            destination[f"{prefix}qweight"] = self._words()

    def _load_from_state_dict(self, *args: Any) -> None:
        held = self.tiles is not None
        if held:
            self.qweight, self.tiles, self.table, self.kernel = self._words(), None, None, None
        super()._load_from_state_dict(*args)
        if held:
            self.finish()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        before = {"scales": self.scales, "table": self.table}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            if tensor is not None and getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(self.qzeros.device))
        if self.kernel is not None and self.kernel.device != self.scales.device.type:
            self.finish()
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, groups={self.groups}"


class StoredLinear(nn.Module):
    """Holds the tensors of a layer that is stored in another way, until ``packed`` makes a layer that computes.

    Args:
        tensors: by their last names, on any device.
        layout: how they hold the layer.
        spec: of the layer.
        bias: taken over as it is.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], *, layout: Stored, spec: QuantSpec, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.layout, self.spec, self.bias = layout, spec, bias

    def packed(self) -> PackedLinear:
        """The layer that computes, on the device of the tensors."""
        tensors = dict(self.named_buffers())
        packed = gptq_layout.pack_layer(self.layout.codes(tensors, self.spec), self.spec, zero_offset=0)
        device = tensors[self.layout.needed[0]].device
        return PackedLinear({name: tensor.to(device) for name, tensor in packed.items()}, zero_offset=0, bias=self.bias)


def unpack_words(words_WN: Tensor, bits: int) -> Tensor:
    """Read a bit stream that runs along the first dimension, on the device it is on.

    Args:
        words_WN: int32; W is a multiple of ``bits``.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 (W * 32 / bits, N) in [0, 2**bits - 1].

    >>> unpack_words(torch.tensor([[0x76543210]] * 4, dtype=torch.int32), 4)[:9].flatten().tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 0]
    """
    words = words_WN.reshape(-1, bits, words_WN.shape[1])
    start = torch.arange(PERIOD, device=words.device, dtype=torch.int32) * bits
    word, shift = start >> 5, (start & 31).unsqueeze(-1)
    mask = (1 << bits) - 1
    codes = words.index_select(1, word).bitwise_right_shift_(shift)
    if PERIOD % bits == 0:
        return codes.bitwise_and_(mask).flatten(0, 1)
    # Codes that straddle two words: the shift has filled their upper bits with copies of the sign.
    inside = (32 - shift).clamp(max=bits)
    codes.bitwise_and_((1 << inside) - 1)
    following = words.index_select(1, (word + 1).clamp(max=bits - 1))
    return codes.bitwise_or_(following.bitwise_left_shift_(inside).bitwise_and_(mask)).flatten(0, 1)
