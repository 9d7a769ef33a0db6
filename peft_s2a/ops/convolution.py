"""Convolutions with a frozen weight: nothing of the input is kept, and the gradients are torch's own.

A large one's gradient may be taken with factors in bfloat16, as those of linear layers (`short_product`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..pieces import piece_bounds
from .channels import channel_sum
from .memory_order import channels_last, shape_only
from .short_product import multiplies_bfloat16

SHORT_WORK, SHORT_CHANNELS = 1 << 27, 64
"""Multiplications, and channels on either side, from which on casting the factors of a gradient pays (on a CPU)."""

CPU_PIECE, DEVICE_PIECE = 1 << 20, 1 << 30
"""Elements of the larger of both gradients that are cast at a time on a CPU, and elsewhere."""


class ConvolutionFunction(torch.autograd.Function):
    """`y = conv(x, W) + b` with W frozen; keeps W. `short`: whether the gradient may be taken in bfloat16."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], short: bool
    ) -> Tensor:
        ctx.geometry, ctx.shape, ctx.input_dtype, ctx.short = geometry, input.shape, input.dtype, short
        ctx.bias_dtype = None if bias is None else bias.dtype
        # torch chooses its algorithm by the layouts of input and weight, of which only the weight is there in backward
        ctx.channels_last = channels_last(input)
        ctx.save_for_backward(weight)
        stride, padding, dilation, transposed, output_padding, groups = geometry
        # autocast knows these, but not torch.convolution
        if transposed:
            transpose = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[input.dim() - 3]
            return transpose(input, weight, bias, stride, padding, output_padding, groups, dilation)
        function = (torch.conv1d, torch.conv2d, torch.conv3d)[input.dim() - 3]
        return function(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        needs_input, _, needs_bias = ctx.needs_input_grad[:3]
        grad_bias = None
        if needs_bias:  # not from convolution_backward, which takes the gradient of the weight for it on some devices
            wide = torch.promote_types(ctx.bias_dtype, torch.float32)
            grad_bias = channel_sum(grad_output, wide).to(ctx.bias_dtype)
        if not needs_input:
            return None, None, grad_bias, None, None
        weight = weight.to(grad_output.dtype)
        if ctx.channels_last is not None:
            weight = weight.contiguous(memory_format=ctx.channels_last)
        if ctx.short and _gains_from_short(grad_output, weight, ctx.geometry):
            grad_input = _short_gradient(grad_output, weight, ctx.shape, ctx.geometry, ctx.channels_last)
        else:
            input = shape_only(ctx.shape, grad_output)
            grad_input, _, _ = torch.ops.aten.convolution_backward(
                grad_output, input, weight, None, *ctx.geometry, [True, False, False]
            )
        return grad_input.to(ctx.input_dtype), None, grad_bias, None, None


def _gains_from_short(grad_output: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> bool:
    """Whether the gradient of the input is faster in bfloat16; depthwise convolutions are bound by memory."""
    return (
        grad_output.dtype == torch.float32
        and geometry[-1] == 1
        and min(weight.shape[:2]) >= SHORT_CHANNELS
        and grad_output.numel() * (weight.numel() // grad_output.shape[1]) >= SHORT_WORK
        and multiplies_bfloat16(weight.device)
    )


def _short_gradient(
    grad_output: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    geometry: tuple[Any, ...],
    channels_last: torch.memory_format | None,
) -> Tensor:
    """The gradient of an input of this shape, from factors in bfloat16; a few items of the batch are cast at a time."""
    dense = channels_last or torch.contiguous_format
    result = torch.empty(tuple(shape), dtype=grad_output.dtype, device=grad_output.device, memory_format=dense)
    short = weight.to(torch.bfloat16)
    piece = CPU_PIECE if weight.device.type == "cpu" else DEVICE_PIECE
    larger = max(grad_output[0].numel(), result[0].numel())
    for start, stop in piece_bounds(len(result), piece // max(larger, 1)):
        rows = grad_output[start:stop].to(torch.bfloat16)
        result[start:stop], _, _ = torch.ops.aten.convolution_backward(
            rows, shape_only((stop - start, *shape[1:]), rows), short, None, *geometry, [True, False, False]
        )
    return result


def convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], short: bool = False
) -> Tensor:
    """`torch.convolution` with a frozen weight.

    Args:
        short: whether the gradient of a large one may be taken in bfloat16.
        geometry: stride, padding, dilation, transposed, output_padding, groups, as `torch.convolution` takes them.
    """
    return ConvolutionFunction.apply(input, weight, bias, geometry, short)
