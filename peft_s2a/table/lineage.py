"""Which torch functions pass the lineage of an activation on: frozen products, views, and sums of constants (RoPE)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.lineage import Call, Input, Items, Leaf, Linear, Node, Reshape
from ..ops.origin import comes_from_codes
from .context import Context

Rule = Callable[[Context, Any, tuple[Any, ...], dict[str, Any]], None]
"""Records the node of a result, given the call that made it."""

LINEAGE: dict[Callable[..., Any], Rule] = {}


def record_lineage(
    context: Context, result: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Records how `result = func(*args, **kwargs)` came about, if an argument's lineage is known."""
    rule = LINEAGE.get(func)
    if rule is not None:
        rule(context, result, args, kwargs)
    elif func in VIEWS:
        _view(context, result, func, args, kwargs)
    elif func in ELEMENTWISE:
        _elementwise(context, result, func, args, kwargs)


def _rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    def enter(rule: Rule) -> Rule:
        LINEAGE.update(dict.fromkeys(functions, rule))
        return rule

    return enter


@_rule(F.linear)
def _linear(context: Context, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    input, weight, bias = (*args, *kwargs.values(), None)[:3] if not kwargs else _bind_linear(args, kwargs)
    node = context.lineage.get(input)
    if node is None or weight.requires_grad or input.dim() < 2:
        return
    leaves = (weight.detach(),) if bias is None else (weight.detach(), bias.detach())
    items = node.items if node.items is not None and node.items.dim < input.dim() - 1 else None
    step = Linear(result.dtype, context.settings.short_products and comes_from_codes(node))
    context.lineage.put(result, Node(step, (node,), leaves, result.shape, result.dtype, items))


def _bind_linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    return named["input"], named["weight"], named.get("bias")


@_rule(
    Tensor.view,
    Tensor.reshape,
    torch.reshape,
    Tensor.flatten,
    torch.flatten,
    Tensor.unflatten,
    torch.unflatten,
    Tensor.squeeze,
    torch.squeeze,
    Tensor.unsqueeze,
    torch.unsqueeze,
    Tensor.contiguous,
    Tensor.clone,
)
def _reshape(context: Context, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    node = context.lineage.get(args[0]) if args else None
    if node is None or result.dtype != node.dtype:
        return
    items = _items_after_reshape(node.items, node.shape, result.shape)
    step = Reshape(tuple(result.shape), items)
    context.lineage.put(result, Node(step, (node,), (), result.shape, result.dtype, items))


def _items_after_reshape(items: Items | None, before: torch.Size, after: torch.Size) -> Items | None:
    """Where the items lie afterwards: the dimension with as many elements before it, if it holds whole items."""
    if items is None or 0 in before:
        return None
    outer = math.prod(before[: items.dim])
    for dim in range(len(after)):
        if math.prod(after[:dim]) == outer and after[dim] % items.count == 0 and (after[dim] > 1 or items.count == 1):
            return Items(items.count, dim, after[dim] // items.count)
    return None


VIEWS = frozenset(
    {
        Tensor.transpose,
        torch.transpose,
        Tensor.swapaxes,
        torch.swapaxes,
        Tensor.swapdims,
        torch.swapdims,
        Tensor.permute,
        torch.permute,
        Tensor.movedim,
        torch.movedim,
        Tensor.mT.__get__,  # type: ignore[attr-defined]
        Tensor.unbind,
        torch.unbind,
        Tensor.chunk,
        torch.chunk,
        Tensor.split,
        torch.split,
        Tensor.narrow,
        torch.narrow,
        Tensor.select,
        torch.select,
        Tensor.__getitem__,
    }
)
"""Functions whose results are strided views of their first argument, one or several."""


def _view(
    context: Context, result: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    node = context.lineage.get(args[0])
    if node is None or any(isinstance(a, Tensor) for a in (*args[1:], *kwargs.values())):
        return
    if func is Tensor.__getitem__ and any(not isinstance(i, (int, slice, type(...))) for i in _as_tuple(args[1])):
        return
    probe = torch.empty(node.shape, device="meta")
    images = func(probe, *args[1:], **kwargs)
    several = isinstance(result, (tuple, list))
    for index, view in enumerate(result if several else [result]):
        image = images[index] if several else images
        items = _items_after_view(node.items, probe, image)
        function = _Select(func, index) if several else func
        step = Call(function, (Input(0), *args[1:]), tuple(kwargs.items()))
        context.lineage.put(view, Node(step, (node,), (), view.shape, view.dtype, items))


class _Select:
    """One of several results."""

    def __init__(self, function: Callable[..., Any], index: int) -> None:
        self.function = function
        self.index = index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)[self.index]


def _as_tuple(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _items_after_view(items: Items | None, before: Tensor, after: Tensor) -> Items | None:
    """Where the items lie in a strided view: the one dimension with the same stride and the same size."""
    if items is None:
        return None
    size, stride = before.shape[items.dim], before.stride(items.dim)
    places = [d for d in range(after.dim()) if after.shape[d] == size and after.stride(d) == stride]
    if len(places) != 1 or size == 1:
        return None  # items of size 1 cannot be told from other dimensions of size 1
    return Items(items.count, places[0], items.factor)


ELEMENTWISE = frozenset(
    {
        torch.mul,
        Tensor.mul,
        Tensor.__mul__,
        Tensor.__rmul__,
        torch.add,
        Tensor.add,
        Tensor.__add__,
        Tensor.__radd__,
        torch.sub,
        Tensor.sub,
        Tensor.__sub__,
        torch.neg,
        Tensor.neg,
        Tensor.__neg__,
        Tensor.__truediv__,
        torch.cat,
        Tensor.to,
        Tensor.float,
        Tensor.type_as,
        torch.roll,
        Tensor.roll,
        F.pad,
    }
)
"""Cheap functions that leave the dimension of the items as it is: what rotary embeddings and windows are made of."""


def _elementwise(
    context: Context, result: Tensor, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    tensors = _tensors((*args, *kwargs.values()))
    nodes = [context.lineage.get(t) for t in tensors]
    parents = [node for node in nodes if node is not None]
    leaves = [t for t, node in zip(tensors, nodes, strict=True) if node is None]
    if not parents or not isinstance(result, Tensor) or any(t.requires_grad for t in leaves):
        return
    items = _common_items(parents, result, func, args, kwargs)
    inputs, constants = itertools.count(), itertools.count()
    places = iter(
        [
            Input(next(inputs)) if node else Leaf(next(constants), _items_of_constant(items, t, result))
            for t, node in zip(tensors, nodes, strict=True)
        ]
    )
    stripped = tuple(_strip(arg, places) for arg in args), tuple((k, _strip(v, places)) for k, v in kwargs.items())
    call = Call(func, *stripped)
    context.lineage.put(result, Node(call, tuple(parents), tuple(leaves), result.shape, result.dtype, items))


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among arguments, in lists and tuples too, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) in (tuple, list):
            found.extend(_tensors(value))
    return found


def _strip(value: Any, places: Iterator[Input | Leaf]) -> Any:
    """The argument with a place for each tensor."""
    if isinstance(value, Tensor):
        return next(places)
    return type(value)(_strip(v, places) for v in value) if type(value) in (tuple, list) else value


def _common_items(
    parents: list[Node], result: Tensor, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Items | None:
    """Where the items lie in the result: where they do in every parent, if the function leaves that dimension alone."""
    items = parents[0].items
    if items is None or any(p.items != items or len(p.shape) != result.dim() for p in parents):
        return None
    if result.shape[items.dim] != items.count * items.factor:
        return None
    if func in (torch.roll, Tensor.roll):
        dims = kwargs.get("dims", args[2] if len(args) > 2 else None)
        dims = (dims,) if isinstance(dims, int) else tuple(dims or range(result.dim()))
        if items.dim in [d % result.dim() for d in dims]:
            return None
    return items


def _items_of_constant(items: Items | None, constant: Tensor, result: Tensor) -> Items | None:
    """Where a constant that is broadcast to the result has the items."""
    if items is None:
        return None
    dim = items.dim - (result.dim() - constant.dim())
    if dim < 0 or constant.shape[dim] != result.shape[items.dim] or constant.shape[dim] == 1:
        return None
    return Items(items.count, dim, items.factor)
