"""Handlers leave to torch what their operators do not do, and do the rest as torch does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_s2a.settings import ActivationSettings
from peft_s2a.table import TABLE, Context

FOUR = Context(ActivationSettings.from_config(4))
EXACT = Context(ActivationSettings.from_config(None))

SMOOTH = [
    (F.gelu, {}),
    (F.gelu, {"approximate": "tanh"}),
    (F.silu, {}),
    (torch.sigmoid, {}),
    (torch.tanh, {}),
    (F.softplus, {"beta": 2, "threshold": 10}),
    (F.elu, {"alpha": 0.5}),
    (F.celu, {"alpha": 0.5}),
    (F.selu, {}),
    (F.mish, {}),
    (F.hardswish, {}),
]


@pytest.mark.parametrize(("function", "options"), SMOOTH, ids=lambda v: getattr(v, "__name__", str(v)))
def test_pointwise_rows(function: Any, options: dict[str, Any], leaf: Any) -> None:
    x, grad = leaf(4, 1024, scale=2), leaf(4, 1024, needs=False)
    output, expected = TABLE[function](FOUR, x, **options), function(x, **options)
    assert torch.equal(output, expected)
    (dx,) = torch.autograd.grad(output, x, grad)
    (exact,) = torch.autograd.grad(expected, x, grad)
    assert float((dx - exact).norm() / exact.norm()) < 0.08
    assert TABLE[function](EXACT, x, **options) is NotImplemented
    assert TABLE[function](FOUR, leaf(1000), **options) is NotImplemented
    assert TABLE[function](FOUR, leaf(4, 1024, dtype=torch.double), **options) is NotImplemented


@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
def test_attention_of_any_number_of_dimensions(lead: tuple[int, ...], leaf: Any) -> None:
    context = Context(ActivationSettings.from_config(8))
    q, k, v = (leaf(*lead, 4, 16, 32) for _ in range(3))
    flat = [t.detach().reshape(-1, 4, 16, 32).requires_grad_() for t in (q, k, v)]
    output = TABLE[F.scaled_dot_product_attention](context, q, k, v)
    expected = F.scaled_dot_product_attention(*flat).view(output.shape)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    grad = leaf(*output.shape, needs=False)
    actual = torch.autograd.grad(output, (q, k, v), grad)
    for ours, theirs in zip(actual, torch.autograd.grad(expected, flat, grad), strict=True):
        torch.testing.assert_close(ours, theirs.view(ours.shape), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("query", "key", "mask"),
    [
        ((3, 4, 16, 32), (1, 4, 16, 32), None),
        ((3, 4, 16, 32), (3, 1, 64, 32), (16, 64)),
        ((3, 4, 16, 32), (4, 16, 32), (4, 16, 16)),
        ((2, 3, 4, 16, 32), (2, 3, 4, 16, 32), (16, 16)),
        ((2, 3, 4, 16, 32), (2, 3, 4, 16, 32), (2, 1, 1, 16, 16)),
        ((2, 3, 4, 16, 32), (3, 4, 16, 32), (3, 4, 16, 16)),
    ],
)
def test_attention_of_what_broadcasts(query: Any, key: Any, mask: Any, leaf: Any) -> None:
    context = Context(ActivationSettings.from_config(8))
    q, k, v = leaf(*query), leaf(*key), leaf(*key)
    bias = None if mask is None else leaf(*mask, needs=False)
    grad = leaf(*query, needs=False)
    results = []
    for function in (
        lambda *args: TABLE[F.scaled_dot_product_attention](context, *args),
        F.scaled_dot_product_attention,
    ):
        output = function(q, k, v, bias)
        results.append((output.detach(), *torch.autograd.grad(output, (q, k, v), grad)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)


def test_exact_attention_is_left_to_torch(leaf: Any) -> None:
    q = leaf(3, 4, 16, 32)
    assert TABLE[F.scaled_dot_product_attention](EXACT, q, q, q) is NotImplemented


def test_softmax_signatures(leaf: Any) -> None:
    x = leaf(4, 16, 32, dtype=torch.bfloat16)
    handler = TABLE[F.softmax]
    assert torch.equal(handler(FOUR, x, -1), torch.softmax(x, -1))
    assert torch.equal(handler(FOUR, x, 2, dtype=torch.float32), torch.softmax(x, 2, torch.float32))
    assert torch.equal(TABLE[torch.softmax](FOUR, x, -1, torch.float32), torch.softmax(x, -1, torch.float32))
    assert torch.equal(handler(FOUR, x, 1), torch.softmax(x, 1))
    assert handler(FOUR, x, None) is NotImplemented


@pytest.mark.parametrize("function", [torch.matmul, torch.bmm, Tensor.__matmul__, torch.mul, Tensor.__mul__])
def test_products_need_two_activations(function: Any, leaf: Any) -> None:
    a, b = leaf(2, 32, 32), leaf(2, 32, 32)
    assert torch.equal(TABLE[function](FOUR, a, b), function(a, b))
    assert TABLE[function](FOUR, a, b.detach()) is NotImplemented
    assert TABLE[function](EXACT, a, b) is NotImplemented
    if function is torch.mul:
        assert torch.equal(TABLE[function](FOUR, a, 2.0), a * 2.0)


def test_dropout_rows(leaf: Any) -> None:
    x = leaf(4, 1024)
    for options in ({"training": False}, {"p": 0.0}, {"p": 1.0}, {"inplace": True}):
        assert TABLE[F.dropout](FOUR, x, **options) is NotImplemented


def test_batch_norm_rows(leaf: Any) -> None:
    x, mean, variance = leaf(4, 8, 8, 8), torch.zeros(8), torch.ones(8)
    handler = TABLE[F.batch_norm]
    assert handler(FOUR, x, mean, variance, leaf(8), None) is NotImplemented  # a trained gamma needs the input
    assert handler(EXACT, x, mean, variance, None, None, True) is NotImplemented
    assert torch.equal(handler(EXACT, x, mean, variance), F.batch_norm(x, mean, variance))


def test_linear_rows(leaf: Any) -> None:
    handler = TABLE[F.linear]
    x, weight = leaf(2, 16, 64), leaf(8, 64)
    assert torch.equal(handler(FOUR, x, weight), F.linear(x, weight))
    assert handler(FOUR, x, weight.detach()) is NotImplemented
    assert handler(FOUR, leaf(32, 64), weight) is NotImplemented
    assert handler(EXACT, x, weight) is NotImplemented


def test_a_head_on_one_token_keeps_that_token_alone(leaf: Any, kept_bytes: Any) -> None:
    tokens, weight = leaf(4, 100, 64), leaf(8, 64).detach().requires_grad_()

    def head(x: Tensor) -> Tensor:
        found = TABLE[F.linear](FOUR, x[:, 0], weight)
        assert found is not NotImplemented
        return found

    assert kept_bytes(lambda: F.linear(tokens[:, 0], weight), [weight]) == 4 * 100 * 64 * 4
    assert kept_bytes(lambda: head(tokens), [weight]) == 4 * 64 * 4
    found, expected = (
        torch.autograd.grad(f(tokens).square().sum(), (tokens, weight))
        for f in (head, lambda x: F.linear(x[:, 0], weight))
    )
    for ours, exact in zip(found, expected, strict=True):
        assert torch.equal(ours, exact)
