"""Pooling: averages keep nothing, maxima keep where in the window they were (4 bits up to 16 positions), exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.packing import pack, unpack
from .convolution import shape_only

_ROW = 1024


class AveragePoolFunction(torch.autograd.Function):
    """`avg_pool2d(x, *options)`; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, options: tuple[Any, ...]) -> Tensor:
        ctx.options, ctx.shape = options, input.shape
        return torch.ops.aten.avg_pool2d(input, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        dummy = grad_output.new_empty(ctx.shape) if grad_output.dim() else grad_output
        return torch.ops.aten.avg_pool2d_backward(grad_output, dummy, *ctx.options), None


class AdaptiveAveragePoolFunction(torch.autograd.Function):
    """`adaptive_avg_pool2d(x, size)`; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, output_size: Any) -> Tensor:
        ctx.shape = input.shape
        return torch.nn.functional.adaptive_avg_pool2d(input, output_size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        if grad_output.shape[-1] == grad_output.shape[-2] == 1:
            # torch takes the mean here
            count = ctx.shape[-1] * ctx.shape[-2]
            return grad_output.expand(ctx.shape) / count, None
        dummy = shape_only(ctx.shape, grad_output)
        return torch.ops.aten._adaptive_avg_pool2d_backward(grad_output, dummy), None


class MaxPoolFunction(torch.autograd.Function):
    """`max_pool2d`; keeps the position in the window, 1 to 8 bits per output element."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        ceil_mode: bool,
    ) -> Tensor:
        output, indices = torch.ops.aten.max_pool2d_with_indices(input, kernel, stride, padding, dilation, ceil_mode)
        ctx.geometry = kernel, stride, padding, dilation, ceil_mode
        ctx.shape = input.shape
        ctx.num_bits = next(b for b in (1, 2, 4, 8) if 2**b >= kernel[0] * kernel[1])
        row, column = _origins(output, stride, padding)
        y = (indices // input.shape[-1] - row) // dilation[0]
        x = (indices % input.shape[-1] - column) // dilation[1]
        codes = (y * kernel[1] + x).to(torch.uint8).reshape(-1)
        codes = torch.nn.functional.pad(codes, (0, -codes.numel() % _ROW))
        ctx.save_for_backward(pack(codes.view(-1, _ROW), ctx.num_bits))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        kernel, stride, padding, dilation, _ = ctx.geometry
        codes = unpack(packed, ctx.num_bits, _ROW).view(-1)[: grad_output.numel()].view(grad_output.shape).long()
        row, column = _origins(grad_output, stride, padding)
        y = codes // kernel[1] * dilation[0] + row
        x = codes % kernel[1] * dilation[1] + column
        grad = torch.ops.aten.max_pool2d_with_indices_backward(
            grad_output, grad_output.new_empty(ctx.shape), *ctx.geometry, y * ctx.shape[-1] + x
        )
        return grad, None, None, None, None, None


def _origins(output: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of the input at which each window of the output begins, `(H, 1)` and `(1, W)`."""
    height, width = output.shape[-2:]
    rows = torch.arange(height, device=output.device) * stride[0] - padding[0]
    columns = torch.arange(width, device=output.device) * stride[1] - padding[1]
    return rows.view(-1, 1), columns.view(1, -1)


def average_pool(input: Tensor, options: tuple[Any, ...]) -> Tensor:
    """`torch.nn.functional.avg_pool2d`; options: kernel, stride, padding, ceil_mode, count_include_pad, divisor."""
    return AveragePoolFunction.apply(input, options)


def adaptive_average_pool(input: Tensor, output_size: Any) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool2d`."""
    return AdaptiveAveragePoolFunction.apply(input, output_size)


def max_pool(
    input: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> Tensor:
    """`torch.nn.functional.max_pool2d` for windows of at most 256 positions."""
    return MaxPoolFunction.apply(input, kernel, stride, padding, dilation, ceil_mode)
