"""Derivatives of the activation functions: all that an elementwise operator needs for backward.

Each class is a hashable function `x -> h'(x)`. A new activation function needs one of these and one row in `table.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gelu:
    """`h(x) = x Phi(x)`, or its tanh approximation."""

    approximate: str = "none"

    def __call__(self, x: Tensor) -> Tensor:
        if self.approximate == "tanh":
            inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
            slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
            tanh = torch.tanh(inner)
            return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * slope
        cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return cdf + x * torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


@dataclass(frozen=True)
class Silu:
    """`h(x) = x sigmoid(factor x)`; QuickGELU has the factor 1.702."""

    factor: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(self.factor * x)
        return s * (1 + self.factor * x * (1 - s))


@dataclass(frozen=True)
class Sigmoid:
    def __call__(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return s * (1 - s)


@dataclass(frozen=True)
class Tanh:
    def __call__(self, x: Tensor) -> Tensor:
        return 1 - torch.tanh(x).square()


@dataclass(frozen=True)
class Softplus:
    """`h(x) = log(1 + exp(beta x)) / beta`, linear above the threshold."""

    beta: float = 1.0
    threshold: float = 20.0

    def __call__(self, x: Tensor) -> Tensor:
        return torch.where(x * self.beta > self.threshold, 1.0, torch.sigmoid(x * self.beta))


@dataclass(frozen=True)
class Elu:
    """`h(x) = x` above zero, `scale alpha (exp(x / width) - 1)` below; ELU, CELU and SELU."""

    alpha: float = 1.0
    scale: float = 1.0
    width: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        below = (self.scale * self.alpha / self.width) * torch.exp(x.clamp(max=0) / self.width)
        return torch.where(x > 0, self.scale, below)


@dataclass(frozen=True)
class Mish:
    """`h(x) = x tanh(softplus(x))`."""

    def __call__(self, x: Tensor) -> Tensor:
        tanh = torch.tanh(torch.nn.functional.softplus(x))
        return tanh + x * torch.sigmoid(x) * (1 - tanh * tanh)


@dataclass(frozen=True)
class Hardswish:
    """`h(x) = x clamp(x + 3, 0, 6) / 6`."""

    def __call__(self, x: Tensor) -> Tensor:
        inside = torch.where(x < -3, 0.0, (2 * x + 3) / 6)
        return torch.where(x > 3, 1.0, inside)
