"""Functions whose derivative is piecewise constant: 1 bit per element, exact. ReLU and its kin are in `activations`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.choice import LEFT, RIGHT, TIE, choose
from ..ops.masked import compared
from .activations import _hardtanh, _leaky_relu, _two_slopes
from .context import MIN_ELEMENTS, Context, replaces

Bound = float | None


def _clamp_between(input: Tensor, low: Any, high: Any, in_place: bool) -> Any:
    if input.dtype == torch.float64 or (low is None and high is None):
        return NotImplemented
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return NotImplemented if in_place else _clamp_between_tensors(input, low, high)

    def inside(x: Tensor) -> Tensor:
        if low is None or high is None:
            return compared(torch.gt, x, low) if high is None else compared(torch.lt, x, high)
        return compared(torch.gt, x, low).logical_and_(compared(torch.lt, x, high))

    function = (lambda x: x.clamp_(low, high)) if in_place else (lambda x: torch.clamp(x, low, high))
    return _two_slopes(input, function, inside, in_place=function if in_place else None)


def _clamp_between_tensors(input: Tensor, low: Any, high: Any) -> Any:
    bounds = [b for b in (low, high) if isinstance(b, Tensor)]
    if any(b.requires_grad for b in bounds) or input.numel() < MIN_ELEMENTS:
        return NotImplemented

    def codes(x: Tensor, _: Tensor) -> Tensor:
        none = torch.zeros((), dtype=torch.bool, device=x.device)
        outside = (none if low is None else x < low) | (none if high is None else x > high)
        tie = (none if low is None else x == low) ^ (none if high is None else x == high)
        return torch.where(outside, RIGHT, torch.where(tie, TIE, LEFT)).to(torch.uint8)

    return choose(input, bounds[0], lambda x, _: torch.clamp(x, low, high), codes)


@replaces(torch.clamp, Tensor.clamp, torch.clip, Tensor.clip)
def _clamp(context: Context, input: Tensor, min: Bound = None, max: Bound = None, *, out: Tensor | None = None) -> Any:
    return NotImplemented if out is not None else _clamp_between(input, min, max, False)


@replaces(torch.clamp_, Tensor.clamp_, torch.clip_, Tensor.clip_)
def _clamp_in_place(context: Context, input: Tensor, min: Bound = None, max: Bound = None) -> Any:
    return _clamp_between(input, min, max, True)


@replaces(torch.clamp_min, Tensor.clamp_min)
def _clamp_min(context: Context, input: Tensor, min: Bound, *, out: Tensor | None = None) -> Any:
    return NotImplemented if out is not None else _clamp_between(input, min, None, False)


@replaces(torch.clamp_max, Tensor.clamp_max)
def _clamp_max(context: Context, input: Tensor, max: Bound, *, out: Tensor | None = None) -> Any:
    return NotImplemented if out is not None else _clamp_between(input, None, max, False)


@replaces(torch.clamp_min_, Tensor.clamp_min_)
def _clamp_min_in_place(context: Context, input: Tensor, min: Bound) -> Any:
    return _clamp_between(input, min, None, True)


@replaces(torch.clamp_max_, Tensor.clamp_max_)
def _clamp_max_in_place(context: Context, input: Tensor, max: Bound) -> Any:
    return _clamp_between(input, None, max, True)


@replaces(F.threshold, torch.threshold)
def _threshold(context: Context, input: Tensor, threshold: float, value: float, inplace: bool = False) -> Any:
    return _two_slopes(
        input,
        lambda x: F.threshold(x, threshold, value),
        lambda x: ~compared(torch.le, _wide(x), threshold),
        in_place=(lambda x: torch.threshold_(x, threshold, value)) if inplace else None,
    )


@replaces(torch.threshold_)
def _threshold_in_place(context: Context, input: Tensor, threshold: float, value: float) -> Any:
    return _threshold(context, input, threshold, value, True)


@replaces(F.hardshrink, torch.hardshrink, Tensor.hardshrink)
def _hardshrink(context: Context, input: Tensor, lambd: float = 0.5) -> Any:
    return _two_slopes(input, lambda x: F.hardshrink(x, lambd), lambda x: _beyond(x, lambd))


@replaces(F.softshrink)
def _softshrink(context: Context, input: Tensor, lambd: float = 0.5) -> Any:
    return _two_slopes(input, lambda x: F.softshrink(x, lambd), lambda x: _beyond(x, lambd))


@replaces(torch.nan_to_num, Tensor.nan_to_num)
def _nan_to_num(context: Context, input: Tensor, *args: Any, out: Tensor | None = None, **kwargs: Any) -> Any:
    if out is not None:
        return NotImplemented
    return _two_slopes(input, lambda x: torch.nan_to_num(x, *args, **kwargs), torch.isfinite)


@replaces(torch._C._nn.hardtanh_)
def _hardtanh_in_place(context: Context, input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    return _hardtanh(context, input, min_val, max_val, True)


@replaces(torch._C._nn.leaky_relu_)
def _leaky_relu_in_place(context: Context, input: Tensor, negative_slope: float = 0.01) -> Any:
    return _leaky_relu(context, input, negative_slope, True)


@replaces(F.rrelu)
def _rrelu(
    context: Context,
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Any:
    return NotImplemented if training else _leaky_relu(context, input, (lower + upper) / 2, inplace)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _beyond(x: Tensor, bound: float) -> Tensor:
    """Outside of `[-bound, bound]`, as torch's shrinking functions see it; NaN is."""
    return compared(torch.ge, x, -bound).logical_and_(compared(torch.le, x, bound)).logical_not_()
