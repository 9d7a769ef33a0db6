"""Derivatives of the activation functions: all that an elementwise operator needs for backward.

Each class is a hashable function `x -> h'(x)`. A new activation function needs one of these and one row in `table.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Derivative = Callable[[Tensor], Tensor]


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


@dataclass(frozen=True)
class Softsign:
    """`h(x) = x / (1 + |x|)`, `h'(x) = 1 / (1 + |x|)^2`; NaN at infinity, as in torch."""

    def __call__(self, x: Tensor) -> Tensor:
        size = 1 + x.abs()
        return (1 - x.abs() / size) / size


@dataclass(frozen=True)
class Tanhshrink:
    """`h(x) = x - tanh(x)`."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.tanh(x).square()


@dataclass(frozen=True)
class Logsigmoid:
    """`h(x) = log(sigmoid(x))`."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.sigmoid(-x)


@dataclass(frozen=True)
class Atan:
    def __call__(self, x: Tensor) -> Tensor:
        return (1 + x.square()).reciprocal()


@dataclass(frozen=True)
class Asinh:
    def __call__(self, x: Tensor) -> Tensor:
        return (1 + x.square()).rsqrt()


def times_derivative(derivative: Derivative, grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """`grad * h'(x)`, in `out` if given (it may be `grad`); by torch's own backward where there is one, else with h'
    in float32."""
    out = torch.empty_like(grad) if out is None else out
    if isinstance(derivative, Gelu):
        return torch.ops.aten.gelu_backward.grad_input(grad, x, approximate=derivative.approximate, grad_input=out)
    if isinstance(derivative, Silu) and derivative.factor == 1:
        return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.mul(grad, derivative(wide).to(grad.dtype), out=out)
