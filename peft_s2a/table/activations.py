"""Activation functions and dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codecs.levels import Derivative, DerivativeCodec
from ..ops import derivatives
from ..ops.dropout import dropout
from ..ops.masked import Mask, masked
from ..ops.pointwise import pointwise
from .context import MIN_ELEMENTS, Context, applies, replaces


def _smooth(
    context: Context,
    kind: str,
    input: Tensor,
    function: Callable[[Tensor], Tensor],
    derivative: Derivative,
    in_place: bool = False,
) -> Any:
    if not applies(context, kind, input) or (in_place and input.is_leaf):
        return NotImplemented
    codec = DerivativeCodec(derivative, context.bits(kind) or 0)
    if in_place:
        return pointwise(input, lambda x: x.copy_(function(x)), codec)
    return pointwise(input, function, codec)


@replaces(F.gelu)
def _gelu(context: Context, input: Tensor, *, approximate: str = "none") -> Any:
    return _smooth(context, "gelu", input, lambda x: F.gelu(x, approximate=approximate), derivatives.Gelu(approximate))


@replaces(F.silu)
def _silu(context: Context, input: Tensor, inplace: bool = False) -> Any:
    return _smooth(context, "silu", input, F.silu, derivatives.Silu(), inplace)


@replaces(torch.sigmoid, F.sigmoid, Tensor.sigmoid)
def _sigmoid(context: Context, input: Tensor, *, out: Tensor | None = None) -> Any:
    if out is not None:
        return NotImplemented
    output = _smooth(context, "pointwise", input, torch.sigmoid, derivatives.Sigmoid())
    if isinstance(output, Tensor):
        context.sigmoids.record(output, *(context.scaled.get(input) or (input, 1.0)))
    return output


@replaces(torch.tanh, F.tanh, Tensor.tanh)
def _tanh(context: Context, input: Tensor, *, out: Tensor | None = None) -> Any:
    if out is not None:
        return NotImplemented
    return _smooth(context, "pointwise", input, torch.tanh, derivatives.Tanh())


@replaces(F.softplus)
def _softplus(context: Context, input: Tensor, beta: float = 1, threshold: float = 20) -> Any:
    derivative = derivatives.Softplus(float(beta), float(threshold))
    return _smooth(context, "pointwise", input, lambda x: F.softplus(x, beta, threshold), derivative)


@replaces(F.elu)
def _elu(context: Context, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Any:
    return _smooth(context, "pointwise", input, lambda x: F.elu(x, alpha), derivatives.Elu(float(alpha)), inplace)


@replaces(F.celu, torch.celu)
def _celu(context: Context, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Any:
    derivative = derivatives.Elu(float(alpha), 1.0, float(alpha))
    return _smooth(context, "pointwise", input, lambda x: F.celu(x, alpha), derivative, inplace)


@replaces(F.selu, torch.selu)
def _selu(context: Context, input: Tensor, inplace: bool = False) -> Any:
    derivative = derivatives.Elu(1.6732632423543772, 1.0507009873554805)
    return _smooth(context, "pointwise", input, F.selu, derivative, inplace)


@replaces(F.mish)
def _mish(context: Context, input: Tensor, inplace: bool = False) -> Any:
    return _smooth(context, "pointwise", input, F.mish, derivatives.Mish(), inplace)


@replaces(F.hardswish)
def _hardswish(context: Context, input: Tensor, inplace: bool = False) -> Any:
    return _smooth(context, "pointwise", input, F.hardswish, derivatives.Hardswish(), inplace)


def _two_slopes(
    input: Tensor,
    function: Callable[[Tensor], Tensor],
    mask: Mask,
    slope: float = 1.0,
    other_slope: float = 0.0,
    in_place: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    if input.numel() < MIN_ELEMENTS:
        return NotImplemented
    if in_place is not None:
        if input.is_leaf:
            return NotImplemented
        function = in_place
    return masked(input, function, mask, slope, other_slope)


@replaces(F.relu, torch.relu, Tensor.relu)
def _relu(context: Context, input: Tensor, inplace: bool = False) -> Any:
    return _two_slopes(input, torch.relu, lambda x: ~(x <= 0), in_place=torch.relu_ if inplace else None)


@replaces(torch.relu_, Tensor.relu_)
def _relu_in_place(context: Context, input: Tensor) -> Any:
    return _relu(context, input, inplace=True)


def _outside(x: Tensor, low: float, high: float) -> Tensor:
    """Compared in float32, as torch does: the bounds need not be numbers of a shorter dtype."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide <= low) | (wide >= high)


@replaces(F.hardtanh)
def _hardtanh(
    context: Context, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Any:
    in_place = (lambda x: F.hardtanh_(x, min_val, max_val)) if inplace else None
    return _two_slopes(
        input,
        lambda x: F.hardtanh(x, min_val, max_val),
        lambda x: _outside(x, min_val, max_val).logical_not_(),
        in_place=in_place,
    )


@replaces(F.relu6)
def _relu6(context: Context, input: Tensor, inplace: bool = False) -> Any:
    return _hardtanh(context, input, 0.0, 6.0, inplace)


@replaces(F.leaky_relu)
def _leaky_relu(context: Context, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    in_place = (lambda x: F.leaky_relu_(x, negative_slope)) if inplace else None
    return _two_slopes(
        input,
        lambda x: F.leaky_relu(x, negative_slope),
        lambda x: x > 0,
        other_slope=negative_slope,
        in_place=in_place,
    )


@replaces(F.hardsigmoid)
def _hardsigmoid(context: Context, input: Tensor, inplace: bool = False) -> Any:
    if inplace:
        return NotImplemented
    # torch's slope is 1 / 6 rounded to float32, in float64 too
    return _two_slopes(input, F.hardsigmoid, lambda x: (x > -3) & (x < 3), slope=0.1666666716337204)


@replaces(F.dropout, torch.dropout)
def _dropout(context: Context, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training or not 0 < p < 1 or inplace or input.numel() < MIN_ELEMENTS:
        return NotImplemented
    return dropout(input, p)
