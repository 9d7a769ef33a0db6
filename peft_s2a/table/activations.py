"""Activation functions and dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codecs.levels import Derivative, DerivativeCodec
from ..ops import derivatives
from ..ops.dropout import dropout
from ..ops.lineage import Elementwise, compile_program
from ..ops.masked import Mask, compared, masked
from ..ops.overwriting import write_over
from ..ops.pointwise import pointwise
from ..ops.rebuilt import rebuilt_pointwise
from .context import MIN_ELEMENTS, TABLE, Context, Handler, applies, replaces


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
    backend = "eager" if in_place else context.settings.backend
    codec = DerivativeCodec(derivative, context.bits(kind) or 0, backend=backend)
    if torch.compiler.is_compiling():
        return pointwise(input, in_place_of(function) if in_place else function, codec)
    if in_place:
        return pointwise(input, in_place_of(function), codec) if torch.is_grad_enabled() else NotImplemented
    if not torch.is_grad_enabled():  # a block that will be recomputed
        return write_over(input, function) if context.overwriting.take(input) else NotImplemented
    known = context.lineage.get(input) if context.rebuilds() else None
    origin = context.origin(kind, input)
    overwrite = context.overwriting.take(input)
    if origin is None:
        output = pointwise(input, function, codec, overwrite)
    else:
        program, leaves = compile_program([origin])
        output = rebuilt_pointwise(input, function, derivative, program, leaves, overwrite)
    if known is not None:
        context.lineage.put(output, replace(known, step=Elementwise(function), parents=(known,), leaves=()))
    return output


def in_place_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function that puts its result in the place of its argument."""
    return lambda x: x.copy_(function(x))


def _plain(function: Callable[[Tensor], Tensor], derivative: Derivative) -> Handler:
    """The handler of a function that takes a tensor and nothing else."""

    def handler(context: Context, input: Tensor, *, out: Tensor | None = None) -> Any:
        return NotImplemented if out is not None else _smooth(context, "pointwise", input, function, derivative)

    return handler


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


@replaces(torch.sigmoid_, Tensor.sigmoid_)
def _sigmoid_in_place(context: Context, input: Tensor) -> Any:
    return _smooth(context, "pointwise", input, torch.sigmoid, derivatives.Sigmoid(), True)


@replaces(torch.tanh_, Tensor.tanh_)
def _tanh_in_place(context: Context, input: Tensor) -> Any:
    return _smooth(context, "pointwise", input, torch.tanh, derivatives.Tanh(), True)


for _function, _derivative in (
    (F.softsign, derivatives.Softsign()),
    (F.tanhshrink, derivatives.Tanhshrink()),
    (F.logsigmoid, derivatives.Logsigmoid()),
    (torch.atan, derivatives.Atan()),
    (Tensor.atan, derivatives.Atan()),
    (torch.asinh, derivatives.Asinh()),
    (Tensor.asinh, derivatives.Asinh()),
):
    TABLE[_function] = _plain(_function, _derivative)


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


@replaces(torch._C._nn.elu_)
def _elu_in_place(context: Context, input: Tensor, alpha: float = 1.0) -> Any:
    return _elu(context, input, alpha, True)


@replaces(torch.celu_)
def _celu_in_place(context: Context, input: Tensor, alpha: float = 1.0) -> Any:
    return _celu(context, input, alpha, True)


@replaces(torch.selu_)
def _selu_in_place(context: Context, input: Tensor) -> Any:
    return _selu(context, input, True)


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
    in_place = torch.relu_ if inplace else None
    return _two_slopes(input, torch.relu, lambda x: ~compared(torch.le, x, 0), in_place=in_place)


@replaces(torch.relu_, Tensor.relu_)
def _relu_in_place(context: Context, input: Tensor) -> Any:
    return _relu(context, input, inplace=True)


def _outside(x: Tensor, low: float, high: float) -> Tensor:
    """Compared in float32, as torch does: the bounds need not be numbers of a shorter dtype."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return compared(torch.le, wide, low).logical_or_(compared(torch.ge, wide, high))


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
        lambda x: compared(torch.gt, x, 0),
        other_slope=negative_slope,
        in_place=in_place,
    )


@replaces(F.hardsigmoid)
def _hardsigmoid(context: Context, input: Tensor, inplace: bool = False) -> Any:
    in_place = (lambda x: F.hardsigmoid(x, inplace=True)) if inplace else None
    # torch's slope is 1 / 6 rounded to float32, in float64 too
    return _two_slopes(
        input,
        F.hardsigmoid,
        lambda x: compared(torch.gt, x, -3).logical_and_(compared(torch.lt, x, 3)),
        0.1666666716337204,
        in_place=in_place,
    )


@replaces(F.dropout, torch.dropout)
def _dropout(context: Context, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training or not 0 < p < 1 or inplace or input.numel() < MIN_ELEMENTS:
        return NotImplemented
    return dropout(input, p)
