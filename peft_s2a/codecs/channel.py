"""Codes for the heads of an attention: one scale for each head channel over the tokens.

Outlier channels of queries and keys keep to themselves, and the zero point takes up the mean over the tokens, which
the softmax does not see in the keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .affine import affine_range, dequantize, inverse_scale, quantize
from .backend import compiles, run
from .base import Kept
from .chunked import chunk_bounds, collect_chunks
from .packing import pack, packed_width, planes, unpack_numbers
from .rounding import Rounding, rounding_backend


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
    rounding: Rounding = "nearest"
    backend: str = "eager"

    @property
    def _rounding_backend(self) -> str:
        return rounding_backend(self.backend, self.rounding)

    def encode(self, heads: Tensor) -> Kept:
        size = math.prod(heads.shape[1:])  # of an item
        if heads.numel() == 0 or compiles(self._rounding_backend, heads):
            return self._encode(heads)
        bounds = chunk_bounds(heads.numel(), heads.device, size)
        return collect_chunks(size, heads.numel(), bounds, lambda i, j: self._encode(heads[i // size : j // size]))

    def _encode(self, heads: Tensor) -> Kept:
        kept: Kept = run(self._rounding_backend, _heads_to_codes, self, heads)
        return kept

    def decode(self, kept: Kept, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
        tokens_first: Tensor = run(self.backend, _decode, (self, shape[1:], dtype), *kept)
        return tokens_first.transpose(1, 2)


def _rows(shape: Sequence[int]) -> int:
    """Rows that an item `(H, L, D)` is packed in: one for each token if that leaves no gaps."""
    heads, tokens, channels = shape
    return tokens if heads * channels % 8 == 0 else 1


def _heads_to_codes(codec: ChannelAffineCodec, heads: Tensor) -> Kept:
    """A kernel."""
    scale, zero_point, inverse = _ranges(codec, heads)
    return _codes(codec, heads, inverse, zero_point), scale, zero_point


def _ranges(codec: ChannelAffineCodec, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if heads.numel() == 0:
        low = high = heads.sum(2).float()
    else:
        low, high = heads.amin(2).float(), heads.amax(2).float()
    scale, zero_point = affine_range(low, high, codec.num_bits)
    return scale, zero_point, inverse_scale(scale)


def _codes(codec: ChannelAffineCodec, heads: Tensor, inverse: Tensor, zero_point: Tensor) -> Tensor:
    items, rows = heads.shape[0], _rows(heads.shape[1:])
    tokens_first = heads.transpose(1, 2)  # (N, L, H, D)
    codes = quantize(tokens_first, inverse.unsqueeze(1), zero_point.unsqueeze(1), codec.num_bits, codec.rounding)
    width = math.prod(heads.shape[1:]) // max(rows, 1)
    codes = codes.reshape(items * rows, width)
    packed = pack(torch.nn.functional.pad(codes, (0, -width % 8)) if width % 8 else codes, codec.num_bits)
    return packed.view(items, rows * packed.shape[1])


def _decode(spec: tuple[ChannelAffineCodec, tuple[int, int, int], torch.dtype], *kept: Tensor) -> Tensor:
    """`(N, L, H, D)`: a kernel."""
    codec, (heads, tokens, channels), dtype = spec
    packed, scale, zero_point = kept
    items, rows = packed.shape[0], _rows((heads, tokens, channels))
    width = heads * tokens * channels // max(rows, 1)
    padded = width + (-width % 8)
    packed = packed.view(items * rows, packed_width(padded, codec.num_bits))
    if rows == tokens and width and torch.compiler.is_compiling():
        # loops over the pieces of a row that are packed together, for scales too
        pieces = planes(codec.num_bits)
        codes = unpack_numbers(packed, codec.num_bits, width, width // pieces).view(
            items, tokens, pieces, width // pieces
        )
        scale, zero_point = (t.reshape(items, 1, pieces, width // pieces) for t in (scale, zero_point))
        return dequantize(codes, scale, zero_point, dtype).view(items, tokens, heads, channels)
    codes = unpack_numbers(packed, codec.num_bits, padded)[:, :width].reshape(items, tokens, heads, channels)
    return dequantize(codes, scale.unsqueeze(1), zero_point.unsqueeze(1), dtype)
