"""Codes for the rows of a softmax: nearest code of the square root, relative to the row's largest probability.

The square root spends the codes where probabilities are small, and the decoded rows are scaled to sum to one, so that
the rows of the gradient of the logits sum to zero, as they do exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Kept
from .packing import pack, unpack
from .rounding import Rounding, round_codes


@dataclass(frozen=True)
class RowCodec:
    """Encodes `(R, C)` tensors row by row."""

    def encode(self, rows: Tensor) -> Kept:
        """Identity: the rows themselves are kept."""
        return (rows,)

    def decode(self, kept: Kept, width: int, dtype: torch.dtype) -> Tensor:
        """`(R, width)` in `dtype`."""
        return kept[0].to(dtype)


@dataclass(frozen=True)
class SqrtProbabilityCodec(RowCodec):
    """Keeps `num_bits` per element and one bfloat16 (the largest probability's square root) for each row."""

    num_bits: int
    rounding: Rounding = "nearest"

    def encode(self, rows: Tensor) -> Kept:
        roots = rows.float().sqrt()
        largest = roots.amax(-1, keepdim=True)
        # a little more than the largest, so that no code exceeds the top; NaN in the row stays NaN
        largest = (largest * (1 + 2.0**-8)).to(torch.bfloat16)
        levels = 2**self.num_bits - 1
        codes = round_codes(roots * (levels / largest.float()), self.rounding)
        codes = codes.nan_to_num_(nan=0.0).clamp_(0, levels).to(torch.uint8)
        padding = -codes.shape[-1] % 8
        if padding:
            codes = torch.nn.functional.pad(codes, (0, padding))
        return pack(codes, self.num_bits), largest

    def decode(self, kept: Kept, width: int, dtype: torch.dtype) -> Tensor:
        packed, largest = kept
        padded = width + (-width % 8)
        roots = unpack(packed, self.num_bits, padded)[:, :width].float()
        squares = roots.square_()
        # the common factor cancels in the normalisation; it is there to carry NaN and zero rows
        total = squares.sum(-1, keepdim=True)
        scaled = squares * torch.where(total > 0, total.reciprocal(), 0.0)
        return (scaled + largest.float() * 0).to(dtype)


@dataclass(frozen=True)
class KeptRows:
    """Codec of a tensor whose rows have been encoded already: keeps the same tensors once more, at no cost.

    Args:
        kept: what `codec` made of the rows.
        width: elements of a row.
    """

    codec: RowCodec
    kept: Kept
    width: int

    @property
    def unit(self) -> int:
        return self.width

    def encode(self, values: Tensor) -> Kept:
        return self.kept

    def decode(self, kept: Kept, numel: int, dtype: torch.dtype) -> Tensor:
        return self.codec.decode(kept, self.width, dtype).reshape(-1)[:numel]
