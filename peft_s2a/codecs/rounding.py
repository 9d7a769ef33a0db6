"""Stochastic rounding that needs no random state: up with the probability of the fraction, decided by a hash.

The hash is of the number itself, its place in its group or row, and torch's seed (`torch.manual_seed`). So the same
seed gives the same codes, a checkpoint that computes a block again finds the same codes, whether or not it restores the
random state, and dropout draws what it draws without any rounding. The mean over seeds is the number.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _seed() -> int:
    """Torch's seed in 31 bits; a constant of a traced graph."""
    return torch.initial_seed() * 0x9E3779B97F4A7C15 >> 20 & 0x7FFFFFFF


def uniform(numbers: Tensor) -> Tensor:
    """A number in [0, 1) for each of `numbers`, float32, that looks random.

    The place counts from the start of each entry of the first dimension: a tensor may be rounded in pieces.
    """
    place = torch.arange(numbers.shape[1:].numel(), dtype=torch.int32, device=numbers.device).view(numbers.shape[1:])
    seed: int = _seed()
    h = numbers.contiguous().view(torch.int32) + place * 0x27D4EB2F + seed
    # the finaliser of murmur3; int32 products wrap around
    h = (h ^ (h >> 16 & 0xFFFF)) * -0x7A143595
    h = (h ^ (h >> 13 & 0x7FFFF)) * -0x3D4D51CB
    h = h ^ (h >> 16 & 0xFFFF)
    return (h >> 8 & 0xFFFFFF).float().mul_(2.0**-24)


def round_codes(numbers: Tensor, rounding: Rounding) -> Tensor:
    """Whole numbers (float32) for `numbers` (float32, not negative), which may be changed."""
    if rounding == "nearest":
        return numbers.round_()
    return (numbers + uniform(numbers)).floor_()


def rounding_backend(backend: str, rounding: Rounding) -> str:
    """Backend of a kernel that rounds: eager for stochastic rounding, since a compiled kernel would keep its seed."""
    return "eager" if rounding == "stochastic" else backend
