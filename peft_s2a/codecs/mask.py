"""One bit per element: the exact code of operators whose derivative has two values.

Eight neighbours share a byte. They are packed and unpacked as one number of 64 bits, by a product that adds it up
shifted by 0, 9, ... 63 bits: that moves the eight ones to the places of the highest byte, and back to a byte each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROW = 1024

_SHIFTED = sum(1 << (9 * i) for i in range(8)) - (1 << 64)  # as a signed number
_ONES = sum(1 << (8 * i) for i in range(8))


def encode_mask(mask: Tensor) -> Tensor:
    """`(N,)` bool to `(ceil(N / 1024), 128)` uint8."""
    rows = math.ceil(mask.numel() / _ROW)
    codes = mask.view(torch.uint8)
    padding = rows * _ROW - mask.numel()
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    if torch.compiler.is_compiling():  # the offset of a view is not known there
        places = 1 << torch.arange(7, -1, -1, dtype=torch.int32, device=mask.device)
        return (codes.reshape(-1, 8) * places).sum(-1).to(torch.uint8).view(rows, _ROW // 8)
    if not codes.is_contiguous() or codes.storage_offset() % 8:
        codes = codes.clone(memory_format=torch.contiguous_format)
    highest_byte = (codes.view(torch.int64) * _SHIFTED).bitwise_right_shift_(56)
    return highest_byte.to(torch.uint8).view(rows, _ROW // 8)


def decode_mask(packed: Tensor, numel: int) -> Tensor:
    """`(numel,)` bool."""
    spread = packed.reshape(-1).to(torch.int64).mul_(_SHIFTED)
    return spread.bitwise_right_shift_(7).bitwise_and_(_ONES).view(torch.bool)[:numel]
