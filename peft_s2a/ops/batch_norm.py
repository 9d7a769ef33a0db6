"""BatchNorm: in training the normalised input is kept in codes; with fixed statistics nothing is kept.

training:  dx = gamma invstd (dy - mean(dy) - x_hat mean(dy x_hat)),   means over batch and positions
fixed:     dx = gamma invstd dy
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.base import Codec
from ..codecs.chunked import chunk_bounds, decode_range, encode_chunked
from .channels import channel_sum, times_channels
from .memory_order import flatten, memory_permutation, unflatten
from .ownership import owned


class FixedBatchNormFunction(torch.autograd.Function):
    """BatchNorm with running statistics and a frozen gamma; keeps the statistics and gamma, `C` numbers each."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(mean, variance, weight)
        return torch.batch_norm(input, weight, bias, mean, variance, False, 0.0, eps, torch.backends.cudnn.enabled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        in_place = owned(grad_output)
        mean, variance, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_input = grad_bias = None
        if needs[4]:
            # torch's kernel for a strided input would add up in the dtype of a bfloat16 gradient
            grad_bias = channel_sum(grad_output, mean.dtype)
        if needs[0]:
            wide = torch.promote_types(variance.dtype, torch.float32)
            factor = 1 / torch.sqrt(variance.to(wide) + ctx.eps)
            factor = factor if weight is None else factor * weight.to(wide)
            target = grad_output if in_place else torch.empty_like(grad_output)
            grad_input = times_channels(grad_output, factor, target)
        return grad_input, None, None, None, grad_bias, None


class BatchNormFunction(torch.autograd.Function):
    """BatchNorm with the batch's statistics; keeps x_hat through `codec` and `2 C` numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        codec: Codec,
    ) -> Tensor:
        output, mean, invstd = torch.native_batch_norm(
            input, weight, bias, running_mean, running_var, True, momentum, eps
        )
        items, channels = input.shape[:2]
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        shape = (1, channels) + (1,) * (input.dim() - 2)
        ctx.permutation = memory_permutation(input)
        per_item = input[0:1].numel()
        centre, factor = mean.to(wide).view(shape), invstd.to(wide).view(shape)

        def normalised(start: int, stop: int) -> Tensor:
            piece = input[start // per_item : stop // per_item].to(wide)
            return flatten((piece - centre) * factor, ctx.permutation)

        kept = encode_chunked(codec, input.numel(), input.device, normalised, unit=max(per_item, 1))
        ctx.codec, ctx.items, ctx.wide = codec, items, wide
        ctx.save_for_backward(invstd, weight, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        in_place = owned(grad_output)
        invstd, weight, *kept = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        wide, codec = ctx.wide, ctx.codec
        channels = grad_output.shape[1]
        shape = (1, channels) + (1,) * (grad_output.dim() - 2)
        over = [d for d in range(grad_output.dim()) if d != 1]
        per_item = grad_output[0:1].numel()
        chunks = partial(chunk_bounds, grad_output.numel(), grad_output.device, codec.unit, max(per_item, 1))

        def piece(start: int, stop: int) -> tuple[slice, Tensor]:
            items = slice(start // per_item, stop // per_item)
            flat = decode_range(codec, tuple(kept), start, stop, wide)
            return items, unflatten(flat, grad_output[items].shape, ctx.permutation)

        grad_sum = channel_sum(grad_output, wide)
        product_sum = torch.zeros_like(grad_sum)
        for start, stop in chunks():
            items, x_hat = piece(start, stop)
            product_sum += (grad_output[items].to(wide) * x_hat).sum(over)
        grad_input = None
        if needs_input:
            count = max(grad_output.numel() // max(channels, 1), 1)
            gamma = invstd.to(wide) if weight is None else invstd.to(wide) * weight.to(wide)
            mean_grad, mean_product = (grad_sum / count).view(shape), (product_sum / count).view(shape)
            grad_input = grad_output if in_place else torch.empty_like(grad_output)
            for start, stop in chunks():
                items, x_hat = piece(start, stop)
                centred = grad_output[items].to(wide) - mean_grad
                grad_input[items] = (centred - x_hat * mean_product) * gamma.view(shape)
        grad_weight = product_sum.to(weight.dtype) if needs_weight else None
        grad_bias = grad_sum.to(weight.dtype if weight is not None else grad_output.dtype) if needs_bias else None
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    codec: Codec,
) -> Tensor:
    """`torch.nn.functional.batch_norm` on `(N, C, ...)`; with fixed statistics gamma must be frozen."""
    if training:
        torch.nn.functional._verify_batch_size(list(input.shape))  # type: ignore[attr-defined]
        return BatchNormFunction.apply(input, weight, bias, running_mean, running_var, momentum, eps, codec)
    return FixedBatchNormFunction.apply(input, running_mean, running_var, weight, bias, eps)
