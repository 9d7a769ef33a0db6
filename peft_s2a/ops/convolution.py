"""Convolutions with a frozen weight: nothing of the input is kept, and the gradients are torch's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def shape_only(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor that stands for its shape: one element, expanded."""
    return like.new_empty(1).expand(tuple(shape))


def _channels_last(x: Tensor) -> torch.memory_format | None:
    """The channels-last format of a map or volume that has it."""
    if x.dim() < 4 or x.is_contiguous():
        return None
    dense = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return dense if x.is_contiguous(memory_format=dense) else None


class ConvolutionFunction(torch.autograd.Function):
    """`y = conv(x, W) + b` with W frozen; keeps W."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
        ctx.geometry, ctx.shape, ctx.input_dtype = geometry, input.shape, input.dtype
        ctx.bias = None if bias is None else (list(bias.shape), bias.dtype)
        # torch chooses its algorithm by the layouts of input and weight, of which only the weight is there in backward
        ctx.channels_last = _channels_last(input)
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
        bias_shape, bias_dtype = ctx.bias or (None, None)
        weight = weight.to(grad_output.dtype)
        if ctx.channels_last is not None:
            weight = weight.contiguous(memory_format=ctx.channels_last)
        grad_input, _, grad_bias = torch.ops.aten.convolution_backward(
            grad_output,
            shape_only(ctx.shape, grad_output),
            weight,
            bias_shape,
            *ctx.geometry,
            [needs_input, False, needs_bias],
        )
        if grad_input is not None:
            grad_input = grad_input.to(ctx.input_dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias_dtype)
        return grad_input, None, grad_bias, None


def convolution(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
    """`torch.convolution` with a frozen weight.

    Args:
        geometry: stride, padding, dilation, transposed, output_padding, groups, as `torch.convolution` takes them.
    """
    return ConvolutionFunction.apply(input, weight, bias, geometry)
