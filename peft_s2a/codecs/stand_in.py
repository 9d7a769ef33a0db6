"""Stand-ins: tensors in whose place torch's own backward gives the same gradient, in few bits or none.

A backward often looks at its saved tensor in one way alone: at the sign (`abs`), at the shape (pooling, padding), at
whether it is zero (a dropout mask). What it can't see need not be kept. These codecs are exact for such a backward and
for no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Kept
from .mask import decode_mask, encode_mask
from .packing import pack, unpack

ROW = 1024


def _rows(values: Tensor) -> Tensor:
    """`(R, ROW)`, padded with zeros."""
    return torch.nn.functional.pad(values, (0, -values.numel() % ROW)).view(-1, ROW)


@dataclass(frozen=True)
class SignCodec:
    """Decodes -1, 0, 1 or NaN: for a backward that takes the sign, or compares with zero. 2 bits."""

    exact: ClassVar[bool] = True
    num_bits: ClassVar[int] = 2
    unit: int = ROW

    def encode(self, values: Tensor) -> Kept:
        codes = torch.where(values.isnan(), 3, torch.where(values > 0, 2, torch.where(values < 0, 0, 1)))
        return (pack(_rows(codes.to(torch.uint8)), 2),)

    def decode(self, kept: Kept, numel: int, dtype: torch.dtype) -> Tensor:
        codes = unpack(kept[0], 2, ROW).view(-1)[:numel]
        return (codes.to(dtype) - 1).masked_fill_(codes == 3, float("nan"))


@dataclass(frozen=True)
class ShapeCodec:
    """Decodes one zero, expanded: for a backward that takes the shape alone. 0 bits."""

    exact: ClassVar[bool] = True
    num_bits: ClassVar[int] = 0
    unit: int = ROW

    def encode(self, values: Tensor) -> Kept:
        return (values.new_empty(0),)

    def decode(self, kept: Kept, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(1, dtype=dtype, device=kept[0].device).expand(numel)


@dataclass(frozen=True)
class BoolCodec:
    """Bool tensors in 1 bit; torch keeps them in 8."""

    exact: ClassVar[bool] = True
    num_bits: ClassVar[int] = 1
    unit: int = ROW

    def encode(self, values: Tensor) -> Kept:
        return (encode_mask(values),)

    def decode(self, kept: Kept, numel: int, dtype: torch.dtype) -> Tensor:
        return decode_mask(kept[0], numel)


@dataclass(frozen=True)
class IndexCodec:
    """Whole numbers from `-bound` to `bound`, in the shortest of 8, 16 and 32 bits that holds them; torch keeps 64."""

    bound: int
    exact: ClassVar[bool] = True
    unit: int = 1

    @property
    def _dtype(self) -> torch.dtype:
        return next(t for t in (torch.int8, torch.int16, torch.int32, torch.int64) if torch.iinfo(t).max >= self.bound)

    @property
    def num_bits(self) -> int:
        return torch.iinfo(self._dtype).bits

    def encode(self, values: Tensor) -> Kept:
        return (values.to(self._dtype, copy=True),)

    def decode(self, kept: Kept, numel: int, dtype: torch.dtype) -> Tensor:
        return kept[0].to(dtype)


@dataclass(frozen=True)
class ScaledMaskCodec:
    """Tensors of zeros and one positive value (the noise of dropout): 1 bit, and the value once for 1024 elements."""

    exact: ClassVar[bool] = True
    num_bits: ClassVar[int] = 1
    unit: int = ROW

    def encode(self, values: Tensor) -> Kept:
        rows = _rows(values)
        return encode_mask(values != 0), rows.amax(1) if len(rows) else rows.sum(1)

    def decode(self, kept: Kept, numel: int, dtype: torch.dtype) -> Tensor:
        mask = decode_mask(kept[0], kept[0].numel() * 8).view(-1, ROW).to(dtype)
        return (mask * kept[1].to(dtype).unsqueeze(1)).view(-1)[:numel]
