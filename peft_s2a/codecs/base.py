"""What a codec is: numbers to the tensors that are kept for backward, and back.

Every operator takes a codec for what it keeps. `IdentityCodec` keeps the numbers themselves: with it `gradcheck`
proves the operator's backward formula, and the error of any other codec is bounded by that codec's own tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Kept = tuple[Tensor, ...]


class Codec(Protocol):
    """Encodes flat tensors. A codec has no state: it is hashable, and everything it needs to decode is in `Kept`.

    Attributes:
        unit: elements of one row of what is kept. Row `i` of every kept tensor depends on the elements
            `[i * unit, (i + 1) * unit)` alone, so a tensor can be encoded and decoded in pieces.
    """

    @property
    def unit(self) -> int: ...

    def encode(self, values: Tensor) -> Kept:
        """Keeps `values`, `(N,)` of any floating dtype."""
        ...

    def decode(self, kept: Kept, numel: int, dtype: torch.dtype) -> Tensor:
        """The values again: `(numel,)` in `dtype`."""
        ...


@dataclass(frozen=True)
class IdentityCodec:
    """Keeps the values as they are: 32 bits per element for float32, no error."""

    unit: int = 1

    def encode(self, values: Tensor) -> Kept:
        return (values,)

    def decode(self, kept: Kept, numel: int, dtype: torch.dtype) -> Tensor:
        return kept[0].to(dtype)
