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
        codes: `(R, C)` uint8, or whole numbers in float32, below `2 ** num_bits`; C is a multiple of 8. Or `(R, G, S)`,
            which is packed as `(R, G * S)` is: loops are simpler this way if whole groups of S share their bytes.
        num_bits: 1, 2, 3, 4, 6 or 8.

    Returns:
        `(R, C * num_bits / 8)` uint8.
    """
    if codes.is_floating_point() and len(_PLANES[num_bits]) > 1:
        codes = _to_bytes(codes)
    parts = []
    offset = 0
    for plane_bits in _PLANES[num_bits]:
        per_byte = 8 // plane_bits
        plane = codes if num_bits == plane_bits else (codes >> offset) & (2**plane_bits - 1)
        if plane.shape[1] % per_byte:
            plane = plane.flatten(1)
        packed, *others = torch.unflatten(plane, 1, (per_byte, plane.shape[1] // per_byte)).unbind(1)
        for i, piece in enumerate(others, start=1):
            shift = i * plane_bits
            # a sum of numbers is vectorised when compiled, a shift of bytes is not
            packed = packed.add(piece, alpha=1 << shift) if piece.is_floating_point() else packed | (piece << shift)
        parts.append(_to_bytes(packed).flatten(1))
        offset += plane_bits
    if len(parts) == 1:
        # `codes` itself for 8 bits: what is kept must not alias the caller's tensor
        return parts[0].clone() if codes.dtype == torch.uint8 and num_bits == 8 else parts[0]
    return torch.cat(parts, dim=1)


def _to_bytes(codes: Tensor) -> Tensor:
    # from float32 by int32 is vectorised on a CPU, the direct one is not
    return codes if codes.dtype == torch.uint8 else codes.to(torch.int32).to(torch.uint8)


def planes(num_bits: int) -> int:
    """Pieces that a row is cut into so that each of them lies in one plane: 2 for 4 bits, 8 for 3 bits."""
    return 8 // min(_PLANES[num_bits])


def unpack(packed: Tensor, num_bits: int, width: int, group: int = 1) -> Tensor:
    """Inverse of `pack`: `(R, width * num_bits / 8)` uint8 to `(R, width)` uint8.

    Args:
        group: the result is `(R, width / group, group)` if this is above 1.
    """
    rows = packed.shape[0]
    shape = (rows, width) if group == 1 else (rows, width // group, group)
    codes: Tensor | None = None
    start = offset = 0
    for plane_bits in _PLANES[num_bits]:
        stop = start + packed_width(width, plane_bits)
        part = packed[:, start:stop]
        per_byte = 8 // plane_bits
        if per_byte == 1:
            plane = part.reshape(shape)
        else:
            if group > 1 and shape[1] % per_byte == 0:
                part = torch.unflatten(part, 1, (-1, group))
            shifts = torch.arange(0, 8, plane_bits, dtype=torch.uint8, device=packed.device)
            shifts = shifts.view(1, -1, *[1] * (part.dim() - 1))
            plane = (part.unsqueeze(1) >> shifts).bitwise_and_(2**plane_bits - 1).view(shape)
        codes = plane if codes is None else codes | (plane << offset)
        start = stop
        offset += plane_bits
    assert codes is not None
    return codes


def unpack_numbers(packed: Tensor, num_bits: int, width: int, group: int = 1) -> Tensor:
    """`unpack` to numbers for arithmetic: uint8, or float32 while compiling."""
    if not torch.compiler.is_compiling():
        return unpack(packed, num_bits, width, group)
    shape = (packed.shape[0], width) if group == 1 else (packed.shape[0], width // group, group)
    return _unpack_floats(packed, num_bits, width, group).view(shape)


def _unpack_floats(packed: Tensor, num_bits: int, width: int, group: int) -> Tensor:
    """Codes by float arithmetic, which compiled code vectorises; shifts of bytes it does not.

    `(R, pieces, ...)`: every piece lies in one byte position of one plane, so that loops run over neighbouring bytes.
    """
    pieces = planes(num_bits)
    size = width // pieces
    inner = (size // group, group) if size % group == 0 else (size,)
    codes: Tensor | None = None
    start = offset = 0
    for plane_bits in _PLANES[num_bits]:
        stop = start + packed_width(width, plane_bits)
        per_byte = 8 // plane_bits
        plane = packed[:, start:stop].float().view(-1, 1, pieces // per_byte, *inner)
        if per_byte > 1:
            place = torch.arange(per_byte, device=packed.device).view(1, -1, 1, *[1] * len(inner))
            factor: Tensor | float = 1.0
            for i in range(1, per_byte):
                factor = torch.where(place == i, 2.0 ** (-i * plane_bits), factor)
            plane = torch.floor(plane * factor)
            plane = plane - torch.floor(plane * 2.0**-plane_bits) * 2**plane_bits
        plane = plane.reshape(-1, pieces, *inner)
        codes = plane if codes is None else codes + plane * 2**offset
        start = stop
        offset += plane_bits
    assert codes is not None
    return codes
