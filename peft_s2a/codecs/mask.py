"""One bit per element: the exact code of operators whose derivative has two values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .packing import pack, unpack

_ROW = 1024


def encode_mask(mask: Tensor) -> Tensor:
    """`(N,)` bool to `(ceil(N / 1024), 128)` uint8."""
    rows = math.ceil(mask.numel() / _ROW)
    codes = mask.view(torch.uint8)
    padding = rows * _ROW - mask.numel()
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    return pack(codes.view(rows, _ROW), 1)


def decode_mask(packed: Tensor, numel: int) -> Tensor:
    """`(numel,)` bool."""
    return unpack(packed, 1, _ROW).view(-1)[:numel].view(torch.bool)
