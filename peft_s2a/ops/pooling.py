"""Pooling: averages keep nothing, maxima keep where in the window they were (4 bits up to 16 positions), exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.chunked import CPU_CHUNK, DEVICE_CHUNK
from ..codecs.packing import pack, unpack
from ..pieces import Bounds, piece_bounds
from .memory_order import shape_only

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
        ctx.geometry = kernel, stride, padding, dilation, ceil_mode
        ctx.shape = input.shape
        ctx.num_bits = next(b for b in (1, 2, 4, 8) if 2**b >= kernel[0] * kernel[1])
        parts = []
        for start, stop in _few_items(input):
            part, indices = torch.ops.aten.max_pool2d_with_indices(input[start:stop], *ctx.geometry)
            row, column = _origins(part, stride, padding)
            y = torch.div(indices, input.shape[-1], rounding_mode="floor").sub_(row)
            x = indices.remainder_(input.shape[-1]).sub_(column)
            if dilation != (1, 1):
                y, x = y // dilation[0], x // dilation[1]
            parts.append((part, y.mul_(kernel[1]).add_(x).to(torch.uint8)))
        output, codes = (torch.cat(tensors) if len(tensors) > 1 else tensors[0] for tensors in zip(*parts, strict=True))
        flat = codes.reshape(-1)
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % _ROW))
        ctx.save_for_backward(pack(flat.view(-1, _ROW), ctx.num_bits))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        kernel, stride, padding, dilation, _ = ctx.geometry
        codes = unpack(packed, ctx.num_bits, _ROW).view(-1)[: grad_output.numel()].view(grad_output.shape)
        row, column = _origins(grad_output, stride, padding)
        grad = grad_output.new_empty(ctx.shape)
        for start, stop in _few_items(grad):
            code = codes[start:stop].long()
            x = (code % kernel[1]).mul_(dilation[1]).add_(column)
            indices = code.div_(kernel[1], rounding_mode="floor").mul_(dilation[0]).add_(row)
            indices.mul_(ctx.shape[-1]).add_(x)
            dummy = shape_only(grad[start:stop].shape, grad)
            grad[start:stop] = torch.ops.aten.max_pool2d_with_indices_backward(
                grad_output[start:stop], dummy, *ctx.geometry, indices
            )
        return grad, None, None, None, None, None


def _few_items(input: Tensor) -> Bounds:
    """Items, or channels where there is no batch, that are worked on at a time: 64 bits a position are many."""
    size = CPU_CHUNK if input.device.type == "cpu" else DEVICE_CHUNK
    if torch.compiler.is_compiling() or not input.numel():
        return iter([(0, len(input))])
    return piece_bounds(len(input), size // input[0].numel())


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
