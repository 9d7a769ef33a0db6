"""The largest or smallest number of a tensor, or along dimensions: where it was is kept in 1 bit, exactly.

dx = dy / n at the n places that equal the result (equal numbers share the gradient), 0 elsewhere
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.mask import decode_mask, encode_mask
from .memory_order import flatten, memory_permutation, unflatten


class ExtremeFunction(torch.autograd.Function):
    """`amax` or `amin`; keeps 1 bit per element of the input."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, function: Callable[..., Tensor], dims: Sequence[int] | None, keepdim: bool
    ) -> Tensor:
        ctx.whole = dims is None
        dims = tuple(d % input.dim() for d in dims or range(input.dim()))
        output = function(input, dims, True)
        ctx.dims, ctx.keepdim, ctx.shape = dims, keepdim, input.shape
        ctx.permutation = memory_permutation(input)
        mask = input == output
        if ctx.whole and input.device.type == "cpu":  # torch.max and torch.min on a CPU take NaN for equal
            mask |= input.isnan() & output.isnan()
        ctx.save_for_backward(encode_mask(flatten(mask, ctx.permutation)))
        return output if keepdim else output.squeeze(dims)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        mask = unflatten(decode_mask(packed, ctx.shape.numel()), ctx.shape, ctx.permutation)
        grad = grad_output
        if not ctx.keepdim:
            for d in sorted(ctx.dims):
                grad = grad.unsqueeze(d)
        share = grad / mask.sum(ctx.dims, keepdim=True)
        return torch.where(mask, share, 0) if ctx.whole else share * mask, None, None, None


def extreme(
    input: Tensor, function: Callable[..., Tensor], dims: Sequence[int] | None = None, keepdim: bool = False
) -> Tensor:
    """`function(input, dims, keepdim)`; `function` is `torch.amax` or `torch.amin`, None stands for all dimensions."""
    return ExtremeFunction.apply(input, function, dims, keepdim)
