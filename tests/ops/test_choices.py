"""Maxima and minima, of two tensors and along dimensions, and logsumexp."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_s2a.codecs.probability import RowCodec, SqrtProbabilityCodec
from peft_s2a.ops.choice import choose, larger, smaller
from peft_s2a.ops.extreme import extreme
from peft_s2a.ops.logsumexp import logsumexp
from peft_s2a.ops.softmax import softmax

OF_TWO = [(torch.maximum, larger), (torch.minimum, smaller), (torch.fmax, larger), (torch.fmin, smaller)]


@pytest.mark.parametrize(("function", "codes"), OF_TWO)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_gradcheck_of_two(function: Any, codes: Any, needs: tuple[bool, bool], leaf: Any) -> None:
    a, b = leaf(4, 7, dtype=torch.double, needs=needs[0]), leaf(4, 1, dtype=torch.double, needs=needs[1])
    assert torch.autograd.gradcheck(lambda a, b: choose(a, b, function, codes), (a, b))


@pytest.mark.parametrize(("function", "codes"), OF_TWO)
@pytest.mark.parametrize("shape", [(0, 5), (1,), (3, 1000), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_two(function: Any, codes: Any, shape: Any, dtype: Any, leaf: Any, same_as_torch: Any) -> None:
    a, b = (leaf(*shape).detach().mul(2).round().to(dtype).requires_grad_() for _ in range(2))
    same_as_torch(lambda a, b: choose(a, b, function, codes), function, a, b)


def test_bytes_of_two(leaf: Any, kept_bytes: Any) -> None:
    a, b = leaf(4, 1024), leaf(1024)
    assert kept_bytes(lambda: choose(a, b, torch.maximum, larger)) == 1024
    assert kept_bytes(lambda: choose(a.detach(), b.detach(), torch.maximum, larger)) == 0


@pytest.mark.parametrize("function", [torch.amax, torch.amin])
@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("dims", [None, (0,), (-1,), (0, 2), (1, -1), ()])
def test_extreme(function: Any, keepdim: bool, dims: Any, leaf: Any, same_as_torch: Any) -> None:
    x = leaf(3, 5, 7).detach().mul(2).round().requires_grad_()  # with ties
    expected = torch.max if function is torch.amax else torch.min
    if dims is None:
        same_as_torch(lambda x: extreme(x, function), expected, x)
    else:
        same_as_torch(lambda x: extreme(x, function, dims, keepdim), lambda x: function(x, dims, keepdim), x)
    y = leaf(2, 3, 4, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda y: extreme(y, function, dims, keepdim), y)


def test_bytes_of_extreme(leaf: Any, kept_bytes: Any) -> None:
    x = leaf(4, 1024)
    assert kept_bytes(lambda: extreme(x, torch.amax, (0,))) == 512
    assert kept_bytes(lambda: extreme(x.detach(), torch.amax)) == 0


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("keepdim", [True, False])
def test_logsumexp(dim: int, keepdim: bool, leaf: Any, same_as_torch: Any, kept_bytes: Any) -> None:
    x = leaf(3, 4, 5, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x: logsumexp(x, dim, keepdim, RowCodec()), x)
    x = leaf(8, 16, 24, scale=3)
    exact, coded = (
        torch.autograd.grad(logsumexp(x, dim, keepdim, codec).square().sum(), x)[0]
        for codec in (RowCodec(), SqrtProbabilityCodec(8))
    )
    assert float((coded - exact).norm() / exact.norm()) < 0.02
    rows, width = x.numel() // x.shape[dim], x.shape[dim]
    assert kept_bytes(lambda: logsumexp(x, dim, keepdim, SqrtProbabilityCodec(8))) == rows * (width + 2)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax_along_any_dimension(dim: int, leaf: Any, same_as_torch: Any, request: Any) -> None:
    x = leaf(3, 4, 5, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x: softmax(x, None, RowCodec(), dim=dim), x)
    request.getfixturevalue("small_chunks")
    y = leaf(5, 6, 7, 8)
    same_as_torch(
        lambda y: softmax(y, None, RowCodec(), dim=dim), lambda y: torch.softmax(y, dim), y, rtol=1e-5, atol=1e-6
    )


def test_double_backward(leaf: Any, refuses_double_backward: Any) -> None:
    refuses_double_backward(lambda x: choose(x, x.detach() + 1, torch.maximum, larger), leaf(4, 8))
    refuses_double_backward(lambda x: extreme(x, torch.amax, (0,)), leaf(4, 8))
    refuses_double_backward(lambda x: logsumexp(x, -1, False, RowCodec()), leaf(4, 8))
