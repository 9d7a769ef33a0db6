"""Encoding and decoding in pieces that stay in the cache, so that no full-size temporary is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .base import Codec, Kept

CPU_CHUNK = 1 << 17
"""Elements of a piece on a CPU: 512 KB of float32, about a core's second-level cache."""

DEVICE_CHUNK = 1 << 24
"""Elements of a piece elsewhere: large enough to hide the launches, small beside an activation of a large batch."""


def chunk_bounds(numel: int, device: torch.device, *units: int) -> Iterator[tuple[int, int]]:
    """Splits `[0, numel)` into pieces whose starts are multiples of every unit. Nothing is split while compiling."""
    unit = math.lcm(*units)
    size = CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK
    step = numel if torch.compiler.is_compiling() else unit * max(1, size // unit)
    for start in range(0, numel, max(step, 1)):
        yield start, min(start + step, numel)


def encode_chunked(
    codec: Codec, numel: int, device: torch.device, values: Callable[[int, int], Tensor], unit: int = 1
) -> Kept:
    """Encodes `numel` values that `values(start, stop)` makes piece by piece.

    Args:
        unit: starts of the pieces are multiples of this, besides those of the codec.
    """
    parts = [codec.encode(values(start, stop)) for start, stop in chunk_bounds(numel, device, codec.unit, unit)]
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return codec.encode(values(0, 0))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def decode_range(codec: Codec, kept: Kept, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Elements `[start, stop)` of what was kept; `start` is a multiple of the codec's unit."""
    first, last = start // codec.unit, math.ceil(stop / codec.unit)
    return codec.decode(tuple(t[first:last] for t in kept), stop - start, dtype)
