"""Linear layers: with a frozen weight nothing of the input is kept, with a trained one its codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.base import Codec
from ..codecs.chunked import decode_range, encode_chunked
from .memory_order import no_view


class LinearFunction(torch.autograd.Function):
    """`y = x W^T + b`; keeps x through `codec` if W has a gradient, otherwise nothing but W."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, codec: Codec) -> Tensor:
        output = no_view(torch.nn.functional.linear(input, weight, bias))
        kept: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[1]:
            flat = input.reshape(-1)
            kept = encode_chunked(codec, flat.numel(), flat.device, lambda start, stop: flat[start:stop])
        ctx.codec, ctx.input_dtype, ctx.input_numel = codec, input.dtype, input.numel()
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(weight, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad = grad_output.reshape(-1, weight.shape[0])
        grad_input = grad_weight = grad_bias = None
        if needs_input:
            grad_input = torch.matmul(grad_output, weight.to(grad.dtype)).to(ctx.input_dtype)
        if needs_weight:
            x = decode_range(ctx.codec, tuple(kept), 0, ctx.input_numel, grad.dtype).view(-1, weight.shape[1])
            grad_weight = (grad.T @ x).to(weight.dtype)
        if needs_bias:
            grad_bias = grad.sum(0).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, codec: Codec) -> Tensor:
    """`torch.nn.functional.linear`."""
    return LinearFunction.apply(input, weight, bias, codec)
