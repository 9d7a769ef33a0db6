"""Codes with a bound on the *relative* error, for a backward that divides by what was saved, or takes its power.

The derivatives of `sqrt`, `log`, `x / y` and their kin are products of powers of the saved tensor: they grow without
bound near zero, where the absolute error of group-wise codes does, too. With a relative error e of the tensor that of a
power p is p e, wherever the tensor is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .affine import GroupAffineCodec
from .base import Kept
from .mask import decode_mask, encode_mask

MAX_RELATIVE_ERROR = 2.0**-8
"""Of `RelativeCodec`, between the smallest normal float32 and the largest bfloat16."""


@dataclass(frozen=True)
class RelativeCodec:
    """bfloat16: 16 bits, signs, zeros, infinities and NaN as they are. Half-precision tensors are kept exactly."""

    num_bits: ClassVar[int] = 16
    unit: int = 1

    def encode(self, values: Tensor) -> Kept:
        if values.dtype in (torch.bfloat16, torch.float16):
            return (values.clone(),)
        return (values.to(torch.bfloat16),)

    def decode(self, kept: Kept, numel: int, dtype: torch.dtype) -> Tensor:
        return kept[0].to(dtype)


@dataclass(frozen=True)
class SignedAffineCodec:
    """Group-wise affine codes whose sign is exact (one bit more): for a backward that multiplies and compares.

    A positive number decodes to a positive one; others, NaN apart, to zero or less.
    """

    affine: GroupAffineCodec

    @property
    def num_bits(self) -> int:
        return self.affine.num_bits + 1

    @property
    def unit(self) -> int:
        return self.affine.unit

    def encode(self, values: Tensor) -> Kept:
        return encode_mask(values > 0), *self.affine.encode(values)

    def decode(self, kept: Kept, numel: int, dtype: torch.dtype) -> Tensor:
        positive = decode_mask(kept[0], numel)
        decoded = self.affine.decode(kept[1:], numel, dtype)
        return torch.where(positive, decoded.clamp_min(torch.finfo(dtype).tiny), decoded.clamp_max(0))
