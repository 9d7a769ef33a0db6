"""Whether a gradient belongs to one backward call alone, so that its memory may be written over.

A gradient may be shared: with the other branch of a residual sum, with `retain_grad`, with a hook that kept it, with
whoever passed it to `backward`. All of them hold a reference: to the Python object, to the tensor behind it or to its
storage. The three counts that a gradient has when nobody else does are learnt once, from a small graph, and a gradient
with any other counts is left alone. If the counts of shared gradients are no different, nothing is ever owned.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import once_differentiable

from .memory_order import is_dense, storage_address

Counts = tuple[int, ...]


def storage_count(tensor: Tensor) -> int:
    """How many tensors, and others, hold the memory of this one."""
    return torch._C._storage_Use_Count(storage_address(tensor))


def _counts(gradient: Tensor) -> Counts:
    """References to the object, the tensor and the storage; of a view, also to the tensor that it is a view of."""
    base = gradient._base
    counts = sys.getrefcount(gradient), gradient._use_count(), storage_count(gradient)  # type: ignore[attr-defined]
    if base is None:
        return counts
    return *counts, sys.getrefcount(base), base._use_count()  # type: ignore[attr-defined]


class _Probe(torch.autograd.Function):
    """The identity; `found` gets what `owned` would see. Its backward is made as those of the operators are."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, found: list[Counts]) -> Tensor:
        ctx.found = found
        return input.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        ctx.found.append(_seen_by_owned(grad_output))
        return grad_output * 2, None


def _seen_by_owned(gradient: Tensor) -> Counts:
    return _counts(gradient)  # one call deep, as in `owned`


Graph = Callable[[Tensor, Tensor], Any]


def _alone(x: Tensor, y: Tensor) -> Any:
    (y * 3).sum().backward()


def _view(x: Tensor, y: Tensor) -> Any:
    (y.view(-1) * 3).sum().backward()


def _residual(x: Tensor, y: Tensor) -> Any:
    ((y + x) * 3).sum().backward()


def _given(x: Tensor, y: Tensor) -> Any:
    y.backward(grad := torch.ones(4, 4))
    return grad


def _given_view(x: Tensor, y: Tensor) -> Any:
    y.view(-1).backward(grad := torch.ones(16))
    return grad


def _hooked(x: Tensor, y: Tensor) -> Any:
    kept: list[Tensor] = []
    y.register_hook(kept.append)
    (y * 3).sum().backward()
    return kept


def _captured(x: Tensor, y: Tensor) -> Any:
    return torch.autograd.grad((y * 3).sum(), [y, x])


def _other_piece(x: Tensor, y: Tensor) -> Any:
    z = x * 2
    kept: list[Tensor] = []
    z.register_hook(kept.append)
    (torch.cat([z, y]) * 3).sum().backward()
    return kept


_SHARED: tuple[Graph, ...] = (_residual, _given, _given_view, _hooked, _captured, _other_piece)


def _counts_in(graph: Graph) -> Counts:
    found: list[Counts] = []
    leaf = torch.ones(4, 4, device="cpu", requires_grad=True)
    x = leaf * 1
    graph(x, _Probe.apply(x, found))
    return found[0]


@functools.cache
def _counts_of_unshared(kind: type[Tensor] = Tensor) -> tuple[Counts, ...]:
    """The counts of a gradient that is held by nobody else, as it is and as a view; none if they prove nothing.

    Args:
        kind: `Tensor`, or `FakeTensor`, which holds what it is a view of once more.
    """
    found: tuple[Counts, ...] = ()

    def learn() -> None:
        nonlocal found
        try:
            with FakeTensorMode() if kind is FakeTensor else nullcontext():
                unshared = _counts_in(_alone), _counts_in(_view)
                if all(_counts_in(graph) not in unshared for graph in _SHARED):
                    found = unshared
        except (AttributeError, TypeError):
            pass  # a torch without these counters

    thread = threading.Thread(target=learn)  # no mode, hook or graph of the caller reaches it
    thread.start()
    thread.join()
    return found


def owned(gradient: Tensor) -> bool:
    """Whether `gradient`, the argument of the calling `backward`, may be overwritten: nobody else can see it.

    To be called first, with the argument itself, from a backward under `once_differentiable`: every further reference
    and every view makes the answer no. Nothing is owned while a graph is traced, and no gradient whose elements share
    memory or have gaps between them.
    """
    if torch.compiler.is_compiling() or type(gradient) not in (Tensor, FakeTensor) or gradient.requires_grad:
        return False
    if gradient.layout != torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(gradient):
        return False
    if gradient.is_inference() or gradient.is_conj() or gradient.is_neg() or not is_dense(gradient):
        return False
    return _counts(gradient) in _counts_of_unshared(type(gradient))
