"""Under autocast outputs are those of torch, and gradients have its dtypes."""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Toy = types.SimpleNamespace


def test_autocast(toy: Toy) -> None:
    stock, ours = toy.make(), toy.make()
    toy.attach(ours, 8)
    results = []
    for model in (stock, ours):
        model.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(toy.batch())
        output.float().square().sum().backward()
        results.append((output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (expected_output, expected), (output, gradients) = results
    assert output.dtype == expected_output.dtype == torch.bfloat16
    assert torch.equal(output, expected_output)
    assert {n: g.dtype for n, g in gradients.items()} == {n: g.dtype for n, g in expected.items()}
    assert toy.relative_error(gradients, expected) < 0.05


def test_autocast_convolution(toy: Toy) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(8, 1, 1))
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return F.adaptive_avg_pool2d(F.max_pool2d(F.relu(self.norm(self.conv(x + self.shift))), 2), 1).flatten(1)

    results = []
    for bits in ("stock", 8):
        torch.manual_seed(0)
        net = Net()
        net.conv.weight.requires_grad_(False)
        if bits != "stock":
            toy.attach(net, 8)
        with torch.autocast("cpu", torch.bfloat16):
            output = net(torch.randn(2, 8, 12, 12))
        output.float().square().sum().backward()
        results.append((output, {n: p.grad for n, p in net.named_parameters() if p.grad is not None}))
    (expected_output, expected), (output, gradients) = results
    assert output.dtype == expected_output.dtype
    assert torch.equal(output, expected_output)
    assert {n: g.dtype for n, g in gradients.items()} == {n: g.dtype for n, g in expected.items()}
    assert toy.relative_error(gradients, expected) < 0.1
