"""Functions made of others, operands of other types, and tensors changed in place."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Toy = types.SimpleNamespace


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_parts_of_multihead_attention_are_replaced(toy: Toy, need_weights: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(toy.D, toy.H, batch_first=True)
            self.shift = nn.Parameter(torch.zeros(toy.D))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.shift
            return self.attention(x, x, x, need_weights=need_weights)[0]

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = Attention()
        model.attention.requires_grad_(False)
        return model

    stock, exact, ours = build(), build(), build()
    toy.attach(exact, None)
    toy.attach(ours, 8)
    x = torch.randn(4, 40, toy.D, generator=torch.Generator().manual_seed(0))
    expected_output, expected = toy.step(stock, x)
    exact_output, exact_gradients = toy.step(exact, x)
    output, gradients = toy.step(ours, x)
    assert torch.equal(exact_output, expected_output)
    assert torch.equal(output, expected_output)
    toy.assert_same(exact_gradients, expected)
    assert 0 < toy.relative_error(gradients, expected) < 0.05
    assert toy.saved_bytes(ours, x) < toy.saved_bytes(stock, x) / 2


def test_a_python_operand_with_its_own_addition(toy: Toy) -> None:
    class Right:
        def __radd__(self, other: Tensor) -> Tensor:
            return other * 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return (x + Right()) + self.shift  # type: ignore[operator]

    net = Net()
    toy.attach(net)
    assert torch.equal(net(torch.ones(3)), torch.full((3,), 2.0))


def test_a_mask_changed_in_place_after_it_was_made(toy: Toy) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(toy.D // toy.H))

        def forward(self, x: Tensor) -> Tensor:
            q = x + self.shift
            mask = torch.zeros(toy.B, 1, toy.L, 1) + torch.zeros(1, toy.H, 1, toy.L)
            mask.masked_fill_(torch.ones(toy.L, toy.L, dtype=torch.bool).triu(1), -float("inf"))
            return F.scaled_dot_product_attention(q, q, q, mask)

    x = torch.randn(toy.B, toy.H, toy.L, toy.D // toy.H, generator=torch.Generator().manual_seed(0))
    _, expected = toy.step(Net(), x)
    net = Net()
    toy.attach(net, 8)
    _, gradients = toy.step(net, x)
    assert toy.relative_error(gradients, expected) < 0.05
