"""Each derivative is the one that autograd finds for the torch function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_s2a.codecs.levels import Derivative
from peft_s2a.ops.derivatives import Elu, Gelu, Hardswish, Mish, Sigmoid, Silu, Softplus, Tanh

Function = Callable[[Tensor], Tensor]

PAIRS: list[tuple[Derivative, Function]] = [
    (Gelu(), F.gelu),
    (Gelu("tanh"), lambda x: F.gelu(x, approximate="tanh")),
    (Silu(), F.silu),
    (Sigmoid(), torch.sigmoid),
    (Tanh(), torch.tanh),
    (Softplus(), F.softplus),
    (Softplus(2.5, 3.0), lambda x: F.softplus(x, 2.5, 3.0)),
    (Elu(), F.elu),
    (Elu(0.7), lambda x: F.elu(x, 0.7)),
    (Elu(0.7, 1.0, 0.7), lambda x: F.celu(x, 0.7)),
    (Elu(1.6732632423543772, 1.0507009873554805), F.selu),
    (Mish(), F.mish),
    (Hardswish(), F.hardswish),
]


@pytest.mark.parametrize(("derivative", "function"), PAIRS, ids=[str(d) for d, _ in PAIRS])
def test_derivative_is_autograds(derivative: Derivative, function: Function) -> None:
    x = torch.linspace(-30, 30, 20_001, dtype=torch.double, requires_grad=True)
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    actual = derivative(x.detach())
    # torch's own kernels hold a few constants in single precision; the corners of a hardswish are measure zero
    corners = (
        torch.isclose(x.abs(), torch.tensor(3.0, dtype=torch.double)) if isinstance(derivative, Hardswish) else x > 99
    )
    torch.testing.assert_close(actual[~corners], expected[~corners], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("derivative", "function"), PAIRS, ids=[str(d) for d, _ in PAIRS])
def test_not_finite_where_autograd_is_not(derivative: Derivative, function: Function) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf")], requires_grad=True)
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    assert derivative(x.detach())[expected.isnan()].isnan().all()


@pytest.mark.parametrize("derivative", [d for d, _ in PAIRS], ids=str)
def test_derivatives_are_hashable_values(derivative: Derivative) -> None:
    assert hash(derivative) == hash(derivative)
    assert len({derivative, derivative}) == 1


def test_parameters_tell_derivatives_apart() -> None:
    assert Gelu() != Gelu("tanh")
    assert Softplus(1.0) != Softplus(2.0)
