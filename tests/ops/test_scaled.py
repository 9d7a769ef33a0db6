"""A gate made of its own input is a SiLU, whatever the factor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_s2a.settings import ActivationSettings
from peft_s2a.table import TABLE, Context


def quick_gelu(x: Tensor, context: Context | None) -> Tensor:
    if context is None:
        return x * torch.sigmoid(1.702 * x)
    scaled = TABLE[torch.mul](context, x, 1.702)
    return TABLE[torch.mul](context, x, TABLE[torch.sigmoid](context, scaled))


def test_quick_gelu_is_one_function(leaf: Any) -> None:
    context = Context(ActivationSettings.from_config(4))
    x, grad = leaf(4, 1024, scale=2), leaf(4, 1024, needs=False)
    assert torch.equal(quick_gelu(x, context), quick_gelu(x, None))
    (dx,) = torch.autograd.grad(quick_gelu(x, context), x, grad)
    (exact,) = torch.autograd.grad(quick_gelu(x, None), x, grad)
    assert float((dx - exact).norm() / exact.norm()) < 0.08


@pytest.mark.parametrize("changed", ["input", "gate"])
def test_what_was_changed_in_place_is_an_ordinary_product(changed: str, leaf: Any) -> None:
    context = Context(ActivationSettings.from_config(8))
    x, grad = leaf(4, 1024), leaf(4, 1024, needs=False)
    gradients = []
    for sigmoid, multiply in (
        (torch.sigmoid, torch.mul),
        (lambda t: TABLE[torch.sigmoid](context, t), lambda a, b: TABLE[torch.mul](context, a, b)),
    ):
        hidden = x * 1.0
        gate = sigmoid(hidden) + 0.0 if sigmoid is torch.sigmoid else sigmoid(hidden)
        if changed == "input":
            hidden.add_(1.0)
        else:
            gate = gate.mul_(0.5) if sigmoid is not torch.sigmoid else gate * 0.5
        gradients.append(torch.autograd.grad(multiply(hidden, gate), x, grad)[0])
    exact, ours = gradients
    assert float((ours - exact).norm() / exact.norm()) < 0.05


def test_a_square_is_an_ordinary_product(leaf: Any) -> None:
    context = Context(ActivationSettings.from_config(8))
    x = leaf(4, 1024)
    (dx,) = torch.autograd.grad(TABLE[torch.mul](context, x, x).sum(), x)
    torch.testing.assert_close(dx, 2 * x.detach(), rtol=0, atol=0.05)
