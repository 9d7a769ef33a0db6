"""The larger and the smaller of numbers: of two tensors, and along dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, float64

from ..ops.choice import Codes, choose, larger, smaller
from ..ops.extreme import extreme
from .context import MIN_ELEMENTS, TABLE, Context, Handler, replaces


def _small(*tensors: Tensor) -> bool:
    return any(not t.is_floating_point() or t.dtype == float64 for t in tensors) or all(
        t.numel() < MIN_ELEMENTS for t in tensors
    )


def _of_two(function: Callable[[Tensor, Tensor], Tensor], codes: Codes) -> Handler:
    def handler(context: Context, input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Any:
        if out is not None or _small(input, other):
            return NotImplemented
        return choose(input, other, function, codes)

    return handler


for _function, _method, _codes in (
    (torch.maximum, Tensor.maximum, larger),
    (torch.minimum, Tensor.minimum, smaller),
    (torch.fmax, Tensor.fmax, larger),
    (torch.fmin, Tensor.fmin, smaller),
):
    TABLE[_function] = TABLE[_method] = _of_two(_function, _codes)


def _along(context: Context, function: Callable[..., Tensor], input: Tensor, dim: Any, keepdim: bool) -> Any:
    if _small(input):
        return NotImplemented
    return extreme(input, function, (dim,) if isinstance(dim, int) else tuple(dim), keepdim)


@replaces(torch.amax, Tensor.amax)
def _amax(context: Context, input: Tensor, dim: Any = (), keepdim: bool = False, *, out: Tensor | None = None) -> Any:
    return NotImplemented if out is not None else _along(context, torch.amax, input, dim, keepdim)


@replaces(torch.amin, Tensor.amin)
def _amin(context: Context, input: Tensor, dim: Any = (), keepdim: bool = False, *, out: Tensor | None = None) -> Any:
    return NotImplemented if out is not None else _along(context, torch.amin, input, dim, keepdim)


def _of_two_or_all(function: Callable[..., Tensor], of_two: Callable[[Tensor, Tensor], Tensor]) -> Handler:
    def handler(context: Context, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`max` and `min` of torch: of all numbers, of two tensors, or (left to torch) along a dimension."""
        if not args and not kwargs:
            return NotImplemented if _small(input) else extreme(input, function)
        other = kwargs.get("other", args[0] if args else None)
        if isinstance(other, Tensor) and len(args) + len(kwargs) == 1:
            return TABLE[of_two](context, input, other)
        return NotImplemented

    return handler


TABLE[torch.max] = TABLE[Tensor.max] = _of_two_or_all(torch.amax, torch.maximum)
TABLE[torch.min] = TABLE[Tensor.min] = _of_two_or_all(torch.amin, torch.minimum)
