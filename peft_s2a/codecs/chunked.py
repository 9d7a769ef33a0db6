"""Encoding and decoding in pieces that stay in the cache, so that no full-size temporary is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..pieces import piece_bounds
from .base import Codec, Kept

CPU_CHUNK = 1 << 18
"""Elements of a piece on a CPU: 1 MB of float32, so that two cores find their parts in their second-level caches."""

DEVICE_CHUNK = 1 << 24
"""Elements of a piece elsewhere: large enough to hide the launches, small beside an activation of a large batch."""


def chunk_bounds(numel: int, device: torch.device, *units: int) -> Iterator[tuple[int, int]]:
    """Splits `[0, numel)` into pieces whose starts are multiples of every unit. Nothing is split while compiling."""
    unit = math.lcm(*units)
    size = CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK
    return piece_bounds(numel, numel if torch.compiler.is_compiling() else unit * max(1, size // unit))


def encode_chunked(
    codec: Codec, numel: int, device: torch.device, values: Callable[[int, int], Tensor], unit: int = 1
) -> Kept:
    """Encodes `numel` values that `values(start, stop)` makes piece by piece.

    Args:
        unit: starts of the pieces are multiples of this, besides those of the codec.
    """
    bounds = chunk_bounds(numel, device, codec.unit, unit)
    return collect_chunks(codec.unit, numel, bounds, lambda start, stop: codec.encode(values(start, stop)))


def collect_chunks(
    unit: int, numel: int, bounds: Iterable[tuple[int, int]], encode: Callable[[int, int], Kept]
) -> Kept:
    """What `encode` makes of all pieces, each written to its place; row `i` belongs to the elements from `i * unit`."""
    whole: Kept = ()
    for start, stop in bounds:
        part = encode(start, stop)
        if stop - start == numel:
            return part
        if not whole:
            whole = tuple(t.new_empty((math.ceil(numel / unit), *t.shape[1:])) for t in part)
        for target, t in zip(whole, part, strict=True):
            target[start // unit : math.ceil(stop / unit)] = t
    return whole or encode(0, 0)


def decode_range(codec: Codec, kept: Kept, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Elements `[start, stop)` of what was kept; `start` is a multiple of the codec's unit."""
    first, last = start // codec.unit, math.ceil(stop / codec.unit)
    return codec.decode(tuple(t[first:last] for t in kept), stop - start, dtype)
