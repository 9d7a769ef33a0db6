"""Codes for the heads of an attention: one scale for each head channel over the tokens.

Outlier channels of queries and keys keep to themselves, and the zero point takes up the mean over the tokens, which
the softmax does not see in the keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .affine import affine_range, dequantize, quantize
from .base import Kept
from .packing import pack, packed_width, unpack


class HeadCodec(Protocol):
    """Encodes `(N, H, L, D)` tensors; every kept tensor has N rows, so that pieces of a batch can be decoded alone."""

    def encode(self, heads: Tensor) -> Kept: ...

    def decode(self, kept: Kept, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class IdentityHeadCodec:
    """Keeps the tensor itself, without error."""

    def encode(self, heads: Tensor) -> Kept:
        return (heads,)

    def decode(self, kept: Kept, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
        return kept[0].to(dtype)


@dataclass(frozen=True)
class ChannelAffineCodec:
    """One scale and zero point for each channel of each head, over the L tokens.

    Keeps `num_bits + 32 / L` bits per element. Codes lie in the order (token, head, channel), the order in which a
    linear layer makes them.
    """

    num_bits: int

    def encode(self, heads: Tensor) -> Kept:
        tokens_first = heads.transpose(1, 2)  # (N, L, H, D)
        items = heads.shape[0]
        if heads.numel() == 0:
            low = high = tokens_first.sum(1, keepdim=True).float()
        else:
            low, high = (t.float() for t in torch.aminmax(tokens_first, dim=1, keepdim=True))
        scale, zero_point = affine_range(low, high, self.num_bits)
        codes = quantize(tokens_first, scale, zero_point, self.num_bits).reshape(items, math.prod(heads.shape[1:]))
        padding = -codes.shape[1] % 8
        if padding:
            codes = torch.nn.functional.pad(codes, (0, padding))
        return pack(codes, self.num_bits), scale.squeeze(1), zero_point.squeeze(1)

    def decode(self, kept: Kept, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
        packed, scale, zero_point = kept
        items, heads, tokens, channels = shape
        width = heads * tokens * channels
        padded = width + (-width % 8)
        assert packed.shape[1] == packed_width(padded, self.num_bits)
        codes = unpack(packed, self.num_bits, padded)[:, :width].view(items, tokens, heads, channels)
        return dequantize(codes, scale.unsqueeze(1), zero_point.unsqueeze(1), dtype).transpose(1, 2)
