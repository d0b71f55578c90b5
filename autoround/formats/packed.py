"""Linear layers of quantized checkpoints, in plain torch on every device; they compute on packed GPTQ tensors.

Legend: O output features, I input features, G groups in a row.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autoround.formats import gptq_layout
from autoround.formats.bits import PERIOD
from autoround.formats.stored import Stored
from autoround.spec import QuantSpec

# Codes dequantized at once on a CPU: few enough to stay in its cache and to reuse memory that is already mapped.
_CPU_CODES = 2**18


class PackedLinear(nn.Module):
    """A linear layer whose weight stays packed and is dequantized in every call.

    The weight is ``scale * (q - zero)`` in float32, then cast to the input's dtype, which is also the output's.

    Attributes:
        qweight: int32 (I * bits / 32, O).
        qzeros: int32 (G, O * bits / 32), holding ``zero - zero_offset``.
        scales: float (G, O), of either sign.
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
        self.groups, self.out_features = self.scales.shape
        self.bits = self.qzeros.shape[1] * 32 // self.out_features
        self.in_features = self.qweight.shape[0] * 32 // self.bits
        self.zero_offset = zero_offset
        self.reordered = False
        self.bias = bias

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None

    def check_order(self) -> None:
        """Find out, once the tensors are loaded, whether columns are in order."""
        if self.g_idx is not None:
            columns = torch.arange(self.in_features, device=self.g_idx.device)
            self.reordered = not torch.equal(self.g_idx, (columns // (self.in_features // self.groups)).int())

    def dequantize(self, first: int = 0, count: int | None = None) -> Tensor:
        """The weight of ``count`` output features from ``first`` on (both multiples of 32), float32 (I, count)."""
        last = self.out_features if count is None else min(first + count, self.out_features)
        words = slice(first * self.bits // 32, last * self.bits // 32)
        zero_GO = unpack_words(self.qzeros[:, words].t(), self.bits).t().contiguous().float() + self.zero_offset
        scale_GO = self.scales[:, first:last].float()
        weight_IO = unpack_words(self.qweight[:, first:last], self.bits).float()
        if self.reordered and self.g_idx is not None:
            return weight_IO.sub_(zero_GO[self.g_idx]).mul_(scale_GO[self.g_idx])
        grouped = weight_IO.view(self.groups, -1, last - first)
        grouped.sub_(zero_GO.unsqueeze(1)).mul_(scale_GO.unsqueeze(1))
        return weight_IO

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) -> (…, O)."""
        count = self.out_features
        if x.device.type == "cpu":
            count = max(PERIOD, _CPU_CODES // self.in_features // PERIOD * PERIOD)
        parts = []
        for first in range(0, self.out_features, count):
            bias = None if self.bias is None else self.bias[first : first + count]
            parts.append(nn.functional.linear(x, self.dequantize(first, count).to(x.dtype).t(), bias))
        return torch.cat(parts, dim=-1)

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
