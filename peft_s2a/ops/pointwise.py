"""Elementwise activation functions with a smooth derivative: the derivative's code is kept, `num_bits` per element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.base import Codec
from ..codecs.chunked import chunk_bounds, decode_range, encode_chunked
from .memory_order import flatten, memory_permutation, unflatten


class PointwiseFunction(torch.autograd.Function):
    """`y = function(x)`; keeps what `codec` makes of x, of which it decodes `h'(x)`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, function: Callable[[Tensor], Tensor], codec: Codec) -> Tensor:
        ctx.codec = codec
        ctx.permutation = memory_permutation(input)
        flat = flatten(input, ctx.permutation)
        ctx.save_for_backward(*encode_chunked(codec, flat.numel(), flat.device, lambda start, stop: flat[start:stop]))
        output = function(input)
        if output is input:
            ctx.mark_dirty(input)
            return input  # by this name a tracer knows it again
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        codec, kept = ctx.codec, ctx.saved_tensors
        grad = flatten(grad_output, ctx.permutation)
        grad_input = torch.empty_like(grad)
        for start, stop in chunk_bounds(grad.numel(), grad.device, codec.unit):
            derivative = decode_range(codec, kept, start, stop, grad.dtype)
            torch.mul(grad[start:stop], derivative, out=grad_input[start:stop])
        return unflatten(grad_input, grad_output.shape, ctx.permutation), None, None


def pointwise(input: Tensor, function: Callable[[Tensor], Tensor], codec: Codec) -> Tensor:
    """`function(input)`, elementwise; `codec` decodes its derivative (`DerivativeCodec`, `ExactDerivativeCodec`).

    The function may work in place and return its argument.
    """
    return PointwiseFunction.apply(input, function, codec)
