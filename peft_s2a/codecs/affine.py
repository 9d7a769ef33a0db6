"""Group-wise affine codes: `value = code * scale + zero_point`, one scale and zero point for each group.

The zero point is rounded down and the scale up before any code is chosen, so the range always covers the group and
the error is at most half a (rounded) scale, with stochastic rounding a whole one. Both are kept in bfloat16, which has
float32's range. A group that holds NaN or an infinity, or whose range is itself beyond float32's, decodes to NaN; one
narrower than 1e-36 to its zero point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import run
from .base import Kept
from .packing import pack, unpack_numbers
from .rounding import Rounding, round_codes, rounding_backend

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


def inverse_scale(scale: Tensor) -> Tensor:
    """`1 / scale`, float32; 0 for a group of equal numbers, whose codes do not matter, and where it is not finite."""
    inverse = scale.float().reciprocal()
    return torch.where(torch.isfinite(inverse), inverse, 0.0)


def quantize(
    values: Tensor, inverse: Tensor, zero_point: Tensor, num_bits: int, rounding: Rounding = "nearest"
) -> Tensor:
    """Codes, whole numbers in float32; `inverse` of the scale and `zero_point` broadcast against `values`."""
    codes = (values.float() - zero_point.float()).mul_(inverse)
    return without_nan(round_codes(codes, rounding)).clamp_(0, 2**num_bits - 1)


def without_nan(codes: Tensor) -> Tensor:
    """Zero for NaN, which has no integer: a group's scale carries it. Codes below zero may become zero, too."""
    if torch.compiler.is_compiling():
        return torch.where(codes > 0, codes, 0.0)  # compiled code vectorises this, eager code the other
    return codes.nan_to_num_(nan=0.0)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """`codes * scale + zero_point`, computed in float32."""
    return codes.float().mul_(scale.float()).add_(zero_point.float()).to(dtype)


@dataclass(frozen=True)
class GroupAffineCodec:
    """Groups of consecutive elements.

    Keeps `num_bits + 32 / group_size` bits per element (64: 4.5 bits at 4 bits), in whole rows.

    Args:
        row: elements that are packed together, a multiple of 8 and of the group size.
        backend: see `backend.py`.
    """

    num_bits: int
    group_size: int = 64
    rounding: Rounding = "nearest"
    row: int = ROW
    backend: str = "eager"

    @property
    def unit(self) -> int:
        return self.row

    def encode(self, values: Tensor) -> Kept:
        rows = math.ceil(values.numel() / self.row)
        padding = rows * self.row - values.numel()
        if padding:
            values = torch.nn.functional.pad(values, (0, padding))
        return self.encode_rows(values.view(rows, self.row))

    def encode_rows(self, rows: Tensor) -> Kept:
        """Encodes whole rows, `(R, row)`."""
        kept: Kept = run(rounding_backend(self.backend, self.rounding), GroupAffineCodec.rows_to_codes, self, rows)
        return kept

    def rows_to_codes(self, rows: Tensor) -> Kept:
        """Encodes whole rows: a kernel, or part of one."""
        scale, zero_point, inverse = _ranges(self, rows)
        return _codes(self, rows, inverse, zero_point), scale, zero_point

    def decode(self, kept: Kept, numel: int, dtype: torch.dtype) -> Tensor:
        rows: Tensor = run(self.backend, _decode_rows, (self, dtype), *kept)
        return rows.view(-1)[:numel]

    def decode_rows(self, kept: Kept, dtype: torch.dtype) -> Tensor:
        """The values of whole rows, `(R, row)`: part of a kernel."""
        packed, scale, zero_point = kept
        codes = unpack_numbers(packed, self.num_bits, self.row, self.group_size)
        return dequantize(codes, scale.unsqueeze(-1), zero_point.unsqueeze(-1), dtype).flatten(1)


def _decode_rows(spec: tuple[GroupAffineCodec, torch.dtype], *kept: Tensor) -> Tensor:
    codec, dtype = spec
    return codec.decode_rows(kept, dtype)


def _ranges(codec: GroupAffineCodec, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grouped = torch.unflatten(rows, 1, (rows.shape[1] // codec.group_size, codec.group_size)).float()
    if rows.numel() == 0:
        low = high = grouped.sum(-1)
    else:
        low, high = grouped.amin(-1), grouped.amax(-1)  # a tenth of aminmax's time
    scale, zero_point = affine_range(low, high, codec.num_bits)
    return scale, zero_point, inverse_scale(scale)


def _codes(codec: GroupAffineCodec, rows: Tensor, inverse: Tensor, zero_point: Tensor) -> Tensor:
    grouped = torch.unflatten(rows, 1, (rows.shape[1] // codec.group_size, codec.group_size))
    codes = quantize(grouped, inverse.unsqueeze(-1), zero_point.unsqueeze(-1), codec.num_bits, codec.rounding)
    return pack(codes, codec.num_bits)
