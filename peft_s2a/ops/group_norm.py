"""GroupNorm, and InstanceNorm, whose groups are single channels: the normalised input is kept in codes.

x_hat = (x - mean) rstd           mean and rstd of each group of an item
dx = rstd (g - mean(g) - x_hat mean(g x_hat)),   g = gamma dy,   means over the group
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.base import Codec
from ..codecs.chunked import chunk_bounds, decode_range, encode_chunked
from .channels import channel_sum
from .ownership import owned


class GroupNormFunction(torch.autograd.Function):
    """Keeps x_hat through `codec` and one number for each group of an item."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        num_groups: int,
        eps: float,
        function: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
        codec: Codec,
    ) -> Tensor:
        output = function(input, weight, bias)
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        per_item = max(input.shape[1:].numel(), 1)
        deviations: list[Tensor] = []

        def normalised(start: int, stop: int) -> Tensor:
            items = input[start // per_item : stop // per_item]
            if not items.numel():
                deviations.append(torch.zeros(items.shape[0], num_groups, 1, dtype=wide, device=items.device))
                return items.to(wide).reshape(-1)
            groups = items.to(wide).reshape(items.shape[0], num_groups, -1)
            variance, mean = torch.var_mean(groups, dim=-1, correction=0, keepdim=True)
            rstd = (variance + eps).rsqrt_()
            deviations.append(rstd)
            return ((groups - mean) * rstd).view(-1)

        kept = encode_chunked(codec, input.numel(), input.device, normalised, unit=per_item)
        ctx.codec, ctx.num_groups, ctx.input_dtype = codec, num_groups, input.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(torch.cat(deviations), weight, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        in_place = owned(grad_output) and grad_output.is_contiguous() and grad_output.dtype == ctx.input_dtype
        rstd, weight, *kept = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        wide, channels = rstd.dtype, grad_output.shape[1]
        per_item = max(grad_output.shape[1:].numel(), 1)
        gamma = None if weight is None else weight.to(wide).view(1, -1, 1)
        grad_bias = channel_sum(grad_output, wide).to(ctx.bias_dtype) if needs_bias else None  # not yet overwritten
        grad_input: Tensor | None = None
        if needs_input:
            grad_input = grad_output if in_place else torch.empty_like(grad_output, dtype=ctx.input_dtype)
        grad_weight = torch.zeros(channels, dtype=wide, device=grad_output.device) if needs_weight else None
        if needs_input or needs_weight:
            for start, stop in chunk_bounds(grad_output.numel(), grad_output.device, ctx.codec.unit, per_item):
                items = slice(start // per_item, stop // per_item)
                piece = grad_output[items]
                g = piece.to(wide).reshape(piece.shape[0], channels, -1)
                x_hat = decode_range(ctx.codec, tuple(kept), start, stop, wide).view(g.shape)
                if grad_weight is not None:
                    grad_weight += (g * x_hat).sum((0, 2))
                if grad_input is not None:
                    g = (g if gamma is None else g * gamma).reshape(piece.shape[0], ctx.num_groups, -1)
                    x_hat = x_hat.view(g.shape)
                    projection = (g * x_hat).mean(-1, keepdim=True)
                    dx = torch.addcmul(g - g.mean(-1, keepdim=True), x_hat, projection, value=-1)
                    grad_input[items] = dx.mul_(rstd[items]).view(piece.shape)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_input, grad_weight, grad_bias, None, None, None, None


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, codec: Codec
) -> Tensor:
    """`torch.nn.functional.group_norm` on `(N, C, ...)`."""

    def function(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.group_norm(input, num_groups, weight, bias, eps)

    return GroupNormFunction.apply(input, weight, bias, num_groups, eps, function, codec)


def instance_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, codec: Codec) -> Tensor:
    """`torch.nn.functional.instance_norm` on `(N, C, ...)`, by the statistics of the input."""

    def function(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.instance_norm(input, None, None, weight, bias, eps=eps)

    return GroupNormFunction.apply(input, weight, bias, input.shape[1], eps, function, codec)
