"""Linear layers, convolutions and pooling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codecs.base import IdentityCodec
from ..ops.convolution import convolution
from ..ops.linear import add_linear, linear
from ..ops.pooling import adaptive_average_pool, average_pool, max_pool
from ..ops.short_product import gains_from_short, short_linear
from ..structure import add_linear as added_by_side_branches
from .context import MIN_ELEMENTS, TABLE, Context, Handler, applies, replaces


@replaces(F.linear)
def _linear(context: Context, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not weight.requires_grad:
        # torch keeps nothing of the input either, but a copy of the weight where autocast casts it
        if not torch.is_autocast_enabled(input.device.type):
            gains = _short(context) and gains_from_short(input, weight)
            return short_linear(input, weight, bias) if gains else NotImplemented
        return linear(input, weight, bias, IdentityCodec())
    if input.dim() < 3:
        # a head on pooled features is small and stays exact; a view of all tokens would keep them all
        if not torch.compiler.is_compiling() and input.untyped_storage().nbytes() > 2 * input.nbytes:
            return F.linear(input.clone(), weight, bias)
        return NotImplemented
    if not applies(context, "linear", input):
        return NotImplemented
    return linear(input, weight, bias, context.affine("linear"))


@replaces(added_by_side_branches)
def _add_linear(
    context: Context, total: Tensor, input: Tensor, weight: Tensor, bias: Tensor, dim: int, in_place: bool
) -> Any:
    codec = context.affine("linear") if applies(context, "linear", input) else IdentityCodec()
    return add_linear(total, input, weight, bias, dim, in_place, codec)


def _short(context: Context) -> bool:
    """Whether gradients of frozen layers may be taken in bfloat16; in a traced graph the compiler has them in full."""
    return context.settings.short_products and not torch.compiler.is_compiling()


def _repeated(value: Any, dimensions: int) -> tuple[int, ...]:
    """One number for each dimension."""
    return (value,) * dimensions if isinstance(value, int) else tuple(value) * (dimensions // len(tuple(value)))


def _convolution(dimensions: int) -> Handler:
    def handler(
        context: Context,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if weight.requires_grad or input.dim() != dimensions + 2:
            return NotImplemented
        stride, dilation = _repeated(stride, dimensions), _repeated(dilation, dimensions)
        if isinstance(padding, str):
            reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if padding == "same" and any(r % 2 for r in reach):
                return NotImplemented
            padding = tuple(r // 2 if padding == "same" else 0 for r in reach)
        geometry = (stride, _repeated(padding, dimensions), dilation, False, (0,) * dimensions, groups)
        return convolution(input, weight, bias, geometry, _short(context))

    return handler


for _dimensions, _function in enumerate((torch.conv1d, torch.conv2d, torch.conv3d), start=1):
    TABLE[_function] = _convolution(_dimensions)


def _transposed_convolution(dimensions: int) -> Handler:
    def handler(
        context: Context,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        if weight.requires_grad or input.dim() != dimensions + 2:
            return NotImplemented
        step, border, spread, extra = (_repeated(v, dimensions) for v in (stride, padding, dilation, output_padding))
        return convolution(input, weight, bias, (step, border, spread, True, extra, groups), _short(context))

    return handler


for _dimensions, _transposed in enumerate(
    (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), start=1
):
    TABLE[_transposed] = _transposed_convolution(_dimensions)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


@replaces(F.max_pool2d, torch.max_pool2d)
def _max_pool(
    context: Context,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    kernel = _pair(kernel_size)
    if return_indices or kernel[0] * kernel[1] > 256 or input.numel() < MIN_ELEMENTS:
        return NotImplemented
    stride = kernel if stride is None or stride == [] else _pair(stride)
    return max_pool(input, kernel, stride, _pair(padding), _pair(dilation), ceil_mode)


@replaces(F.max_pool1d, torch.max_pool1d)
def _max_pool_of_rows(
    context: Context,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    def one(value: Any) -> int:
        return value if isinstance(value, int) else int(value[0])

    kernel = 1, one(kernel_size)
    if return_indices or kernel[1] > 256 or input.numel() < MIN_ELEMENTS:
        return NotImplemented
    strides = kernel if stride is None or stride == [] else (1, one(stride))
    rows = input.unsqueeze(-2)
    return max_pool(rows, kernel, strides, (0, one(padding)), (1, one(dilation)), ceil_mode).squeeze(-2)


@replaces(F.avg_pool2d)
def _average_pool(
    context: Context,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    kernel = _pair(kernel_size)
    stride = kernel if stride is None or stride == [] else _pair(stride)
    return average_pool(input, (kernel, stride, _pair(padding), ceil_mode, count_include_pad, divisor_override))


@replaces(F.adaptive_avg_pool2d)
def _adaptive_average_pool(context: Context, input: Tensor, output_size: Any) -> Any:
    return adaptive_average_pool(input, output_size)
