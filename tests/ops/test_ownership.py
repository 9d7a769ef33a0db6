"""Gradients are overwritten only where nobody else holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from peft_s2a.codecs.affine import GroupAffineCodec
from peft_s2a.codecs.levels import DerivativeCodec
from peft_s2a.codecs.probability import SqrtProbabilityCodec
from peft_s2a.memory.allocator import record_memory_events
from peft_s2a.ops import ownership
from peft_s2a.ops.batch_norm import batch_norm
from peft_s2a.ops.derivatives import Gelu
from peft_s2a.ops.dropout import dropout
from peft_s2a.ops.group_norm import group_norm
from peft_s2a.ops.masked import masked
from peft_s2a.ops.norm import layer_norm
from peft_s2a.ops.ownership import owned
from peft_s2a.ops.pointwise import pointwise
from peft_s2a.ops.product import multiply
from peft_s2a.ops.softmax import softmax

SHAPE = (16, 4, 256)
GROUPS = GroupAffineCodec(8)
OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "pointwise": lambda x: pointwise(x, F.gelu, DerivativeCodec(Gelu(), 8)),
    "masked": lambda x: masked(x, torch.relu, lambda x: x > 0),
    "dropout": lambda x: dropout(x, 0.5),
    "layer_norm": lambda x: layer_norm(x, (256,), None, None, 1e-5, GROUPS),
    "batch_norm": lambda x: batch_norm(x, None, None, None, None, True, 0.1, 1e-5, GROUPS),
    "multiply": lambda x: multiply(x, x.detach().sin().requires_grad_(), GROUPS),
    "group_norm": lambda x: group_norm(x, 2, None, None, 1e-5, GROUPS),
    "softmax": lambda x: softmax(x, None, SqrtProbabilityCodec(8)),
}
all_operators = pytest.mark.parametrize("name", OPERATORS)


class Owned(torch.autograd.Function):
    """The identity; notes whether its gradient is owned, and overwrites it if so."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, answers: list[bool]) -> Tensor:
        ctx.answers = answers
        return input.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        ctx.answers.append(owned(grad_output))
        return (grad_output.mul_(2) if ctx.answers[-1] else grad_output * 2), None


kept: list[Any] = []


def _retained(x: Tensor, y: Tensor) -> Tensor:
    y.retain_grad()
    kept.append(y)
    return (y * 3).sum()


def _hook(x: Tensor, y: Tensor) -> Tensor:
    y.register_hook(kept.append)
    return (y * 3).sum()


def _hook_of_the_node(x: Tensor, y: Tensor) -> Tensor:
    y.grad_fn.register_prehook(lambda grads: kept.append(grads[0]))
    return (y * 3).sum()


def _hook_before(x: Tensor, y: Tensor) -> Tensor:
    z = y * 3
    z.register_hook(lambda grad: kept.append(grad.view(-1)))
    return (z + 1).sum() + (z.view(-1) * 2).sum()


def _hook_that_keeps_a_view(x: Tensor, y: Tensor) -> Tensor:
    y.register_hook(lambda grad: kept.append(grad[1:]))
    return (y * 3).sum()


def _hook_that_keeps_the_base(x: Tensor, y: Tensor) -> Tensor:
    z = y.view(-1)
    z.register_hook(kept.append)
    return (z * 3).sum()


def _cat(x: Tensor, y: Tensor) -> Tensor:
    z = x.sin()
    z.register_hook(kept.append)
    return (torch.cat([z, y]) * 3).sum()


NOT_OWNED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "residual": lambda x, y: ((y + x) * 3).sum(),
    "residual behind a view": lambda x, y: ((y + x).view(-1) * 3).sum(),
    "hook": _hook,
    "hook of the node": _hook_of_the_node,
    "hook that keeps a view": _hook_that_keeps_a_view,
    "hook that keeps the base": _hook_that_keeps_the_base,
    "piece of a gradient that is kept": _cat,
    "expanded": lambda x, y: y.sum(),
    "expanded along one dimension": lambda x, y: (y.sum(0) * 3).sum(),
}
OWNED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda x, y: (y * 3).sum(),
    "linear": lambda x, y: F.linear(y, torch.ones(7, 256)).square().sum(),
    "view": lambda x, y: (y.view(-1) * 3).sum(),
    "views": lambda x, y: (y.view(-1).view(64, 256).t() * 3).sum(),
    "transposed": lambda x, y: (y.transpose(0, 1) * torch.ones(4, 16, 256)).sum(),
    "two consumers": lambda x, y: (y * 3).sum() + (y * 4).sum(),
    "retained": _retained,  # autograd keeps a copy
}


@pytest.mark.parametrize("name", NOT_OWNED)
def test_held_by_somebody_else(name: str, leaf: Any) -> None:
    x, answers = leaf(*SHAPE), list[bool]()
    h = x * 1
    NOT_OWNED[name](h, Owned.apply(h, answers)).backward()
    kept.clear()
    assert answers == [False]


@pytest.mark.parametrize("name", OWNED)
def test_held_by_nobody_else(name: str, leaf: Any) -> None:
    x, answers = leaf(*SHAPE), list[bool]()
    h = x * 1
    OWNED[name](h, Owned.apply(h, answers)).backward()
    kept.clear()
    assert answers == [True]


def test_a_given_gradient_is_left_alone(leaf: Any) -> None:
    x, grad, answers = leaf(*SHAPE), leaf(*SHAPE, needs=False), list[bool]()
    for view in (lambda y: y, lambda y: y.view(-1), lambda y: y.transpose(0, 1)):
        y = view(Owned.apply(x * 1, answers))
        torch.autograd.grad(y, x, view(grad))
        torch.autograd.grad(view(Owned.apply(x * 1, answers)), x, view(leaf(*SHAPE, needs=False)))
    assert answers == [False] * 6


def test_a_captured_gradient_is_left_alone(leaf: Any) -> None:
    x, answers = leaf(*SHAPE), list[bool]()
    y = Owned.apply(x * 1, answers)
    grad, _ = torch.autograd.grad((y * 3).sum(), [y, x])
    assert answers == [False]
    assert (grad == 3).all()


def test_with_a_graph_of_the_backward_nothing_is_owned(leaf: Any) -> None:
    x, answers = leaf(*SHAPE), list[bool]()
    y = Owned.apply(x * 1, answers)
    torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert answers == [False]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed(use_reentrant: bool, leaf: Any) -> None:
    x, answers = leaf(*SHAPE), list[bool]()
    y = checkpoint(lambda x: Owned.apply(x * 1, answers) * 3, x, use_reentrant=use_reentrant)
    (y * 2).sum().backward()
    assert answers == [True]
    assert (x.grad == 12).all()


def test_counts_that_prove_nothing_mean_never(monkeypatch: pytest.MonkeyPatch, leaf: Any) -> None:
    ownership._counts_of_unshared.cache_clear()
    monkeypatch.setattr(ownership, "_counts", lambda gradient: (1, 1))
    answers: list[bool] = []
    try:
        (Owned.apply(leaf(*SHAPE) * 1, answers) * 3).sum().backward()
    finally:
        ownership._counts_of_unshared.cache_clear()
    assert answers == [False]


def _gradients(operator: Callable[[Tensor], Tensor]) -> list[Tensor]:
    found = []
    for graph in (*NOT_OWNED.values(), *OWNED.values()):
        torch.manual_seed(0)
        x = torch.linspace(-2, 2, 16384).view(SHAPE).requires_grad_()
        h = x * 1
        loss = graph(h, operator(h)) + h.square().sum()
        for retain_graph in (True, False):
            (grad,) = torch.autograd.grad(loss, x, retain_graph=retain_graph)
            found += [grad, *(k.grad if k.grad is not None else k for k in kept)]
            kept.clear()
    return found


@all_operators
def test_gradients_with_and_without(name: str, leaf: Any, monkeypatch: pytest.MonkeyPatch, small_chunks: None) -> None:
    """Every way of consuming a result gives the same gradients, and the same twice, as without working in place."""
    results = [_gradients(OPERATORS[name])]
    monkeypatch.setattr(ownership, "is_dense", lambda gradient: False)
    results.append(_gradients(OPERATORS[name]))
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


@all_operators
def test_a_given_gradient_keeps_its_values(name: str, leaf: Any) -> None:
    x, grad = leaf(*SHAPE), leaf(*SHAPE, needs=False)
    before = grad.clone()
    torch.autograd.grad(OPERATORS[name](x * 1), x, grad)
    torch.autograd.grad(OPERATORS[name](x * 1).view(-1), x, grad.view(-1))
    assert torch.equal(grad, before)


@all_operators
def test_backward_makes_no_second_gradient(name: str, leaf: Any, small_chunks: None) -> None:
    x = leaf(64, *SHAPE[1:])
    gradient = x.nbytes
    y = (OPERATORS[name](x) * 3).sum()
    live = peak = 0
    for event in record_memory_events(lambda: torch.autograd.grad(y, x), torch.device("cpu")):
        live += event.bytes
        peak = max(peak, live)
    factors = 2 if name == "multiply" else 1  # the first is that of `* 3`, which the operator overwrites
    assert factors * gradient <= peak < (factors + 0.5) * gradient


class _Handed(torch.autograd.Function):
    """The identity, which asks whether its gradient is owned, notes where it lies, and hands it on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: list[int]) -> Tensor:
        ctx.found = found
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        owned(grad)
        ctx.found.append(grad.data_ptr())
        return grad, None


def test_torch_still_adds_to_a_gradient_in_place_that_was_asked_about() -> None:
    found: list[int] = []
    x = torch.ones(64, 64, requires_grad=True)
    y = _Handed.apply(x * 1, found)
    doubled = y * 2
    (_Handed.apply(y, found) * 3 + doubled).sum().backward()
    assert found[0] == found[1]
    assert torch.equal(x.grad, torch.full_like(x, 5.0))
