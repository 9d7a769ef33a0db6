"""Group-wise affine codes: `value = code * scale + zero_point`, one scale and zero point for each group.

The zero point is rounded down and the scale up before any code is chosen, so the range always covers the group and
the error is at most half a (rounded) scale. Both are kept in bfloat16, which has float32's range. A group that holds
NaN or an infinity, or whose range is itself beyond float32's, decodes to NaN; one narrower than 1e-36 to its
zero point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Kept
from .packing import pack, unpack

ROW = 1024
"""Elements that are packed together."""

_MARGIN = 2.0**-8
"""Relative distance of neighbouring bfloat16 numbers."""


def affine_range(low: Tensor, high: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point (bfloat16) whose codes cover `[low, high]`."""
    zero_point = (low - low.abs() * _MARGIN).to(torch.bfloat16)
    span = high - zero_point.float()
    scale = (span * ((1 + _MARGIN) / (2**num_bits - 1))).to(torch.bfloat16)
    return scale, zero_point


def quantize(values: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int) -> Tensor:
    """Nearest codes, uint8; `scale` and `zero_point` broadcast against `values`."""
    inverse = scale.float().reciprocal()
    # a group of equal zeros has scale 0: its codes do not matter, but 0 * inf would warn in integer conversion
    inverse = torch.where(torch.isfinite(inverse), inverse, 0.0)
    codes = (values.float() - zero_point.float()).mul_(inverse)
    # NaN has no integer: the group's scale carries it, the codes are zero
    return codes.round_().nan_to_num_(nan=0.0).clamp_(0, 2**num_bits - 1).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """`codes * scale + zero_point`, computed in float32."""
    return torch.addcmul(zero_point.float(), codes.float(), scale.float()).to(dtype)


@dataclass(frozen=True)
class GroupAffineCodec:
    """Groups of consecutive elements.

    Keeps `num_bits + 32 / group_size` bits per element (64: 4.5 bits at 4 bits), in whole rows of 1024 elements.
    """

    num_bits: int
    group_size: int = 64

    @property
    def unit(self) -> int:
        return ROW

    def encode(self, values: Tensor) -> Kept:
        rows = math.ceil(values.numel() / ROW)
        padding = rows * ROW - values.numel()
        if padding:
            values = torch.nn.functional.pad(values, (0, padding))
        grouped = values.reshape(rows, ROW // self.group_size, self.group_size).float()
        if rows == 0:
            low = high = grouped.sum(-1, keepdim=True)
        else:
            low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
        scale, zero_point = affine_range(low, high, self.num_bits)
        codes = quantize(grouped, scale, zero_point, self.num_bits)
        return pack(codes.view(rows, ROW), self.num_bits), scale.squeeze(-1), zero_point.squeeze(-1)

    def decode(self, kept: Kept, numel: int, dtype: torch.dtype) -> Tensor:
        packed, scale, zero_point = kept
        codes = unpack(packed, self.num_bits, ROW).view(-1, ROW // self.group_size, self.group_size)
        return dequantize(codes, scale.unsqueeze(-1), zero_point.unsqueeze(-1), dtype).view(-1)[:numel]
