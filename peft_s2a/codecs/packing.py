"""Bits to bytes: small integer codes packed along rows, as planes.

Two codes that share a byte come from two halves of the row, not from neighbours: every plane is a contiguous run, so
packing and unpacking vectorise. A width that is no power of two is split into planes that are (3 = 2 + 1, 6 = 4 + 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}


def packed_width(width: int, num_bits: int) -> int:
    """Bytes that a row of `width` codes takes; `width` must be a multiple of 8."""
    return width * num_bits // 8


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """Packs codes into bytes.

    Args:
        codes: `(R, C)` uint8, values below `2 ** num_bits`; C is a multiple of 8.
        num_bits: 1, 2, 3, 4, 6 or 8.

    Returns:
        `(R, C * num_bits / 8)` uint8.
    """
    rows, width = codes.shape
    parts = []
    offset = 0
    for plane_bits in _PLANES[num_bits]:
        per_byte = 8 // plane_bits
        plane = codes if num_bits == plane_bits else (codes >> offset) & (2**plane_bits - 1)
        pieces = plane.view(rows, per_byte, width // per_byte).unbind(1)
        packed = pieces[0]
        for i, piece in enumerate(pieces[1:], start=1):
            packed = packed | (piece << (i * plane_bits))
        parts.append(packed)
        offset += plane_bits
    if len(parts) == 1:
        # `codes` itself for 8 bits: what is kept must not alias the caller's tensor
        return parts[0].clone() if num_bits == 8 else parts[0]
    return torch.cat(parts, dim=1)


def unpack(packed: Tensor, num_bits: int, width: int) -> Tensor:
    """Inverse of `pack`: `(R, width * num_bits / 8)` uint8 to `(R, width)` uint8."""
    rows = packed.shape[0]
    codes: Tensor | None = None
    start = offset = 0
    for plane_bits in _PLANES[num_bits]:
        stop = start + packed_width(width, plane_bits)
        part = packed[:, start:stop]
        mask = 2**plane_bits - 1
        per_byte = 8 // plane_bits
        if per_byte == 1:
            plane = part
        else:
            plane = torch.stack([(part >> (i * plane_bits)) & mask for i in range(per_byte)], dim=1)
            plane = plane.view(rows, width)
        codes = plane if codes is None else codes | (plane << offset)
        start = stop
        offset += plane_bits
    assert codes is not None
    return codes
