"""The larger or the smaller of two tensors, and its kin: which of the two it was is kept in 2 bits, exactly.

d(left) = dy where it was chosen, dy / 2 where both are equal, 0 elsewhere;  d(right) the same
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.packing import pack, unpack

_ROW = 1024

LEFT, TIE, RIGHT, BOTH = range(4)
"""Codes: who gets the gradient. `BOTH` get it whole, as in torch where NaN makes numbers incomparable."""

Codes = Callable[[Tensor, Tensor], Tensor]


def larger(left: Tensor, right: Tensor) -> Tensor:
    """Codes (uint8) of `maximum` and `fmax`."""
    found = torch.where(left > right, LEFT, torch.where(left < right, RIGHT, BOTH))
    return torch.where(left == right, TIE, found).to(torch.uint8)


def smaller(left: Tensor, right: Tensor) -> Tensor:
    """Codes (uint8) of `minimum` and `fmin`."""
    return larger(-left, -right)


class ChoiceFunction(torch.autograd.Function):
    """`function(left, right)`, elementwise with broadcasting; keeps 2 bits per element of the result."""

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, function: Callable[[Tensor, Tensor], Tensor], codes: Codes
    ) -> Tensor:
        output = function(left, right)
        ctx.shapes, ctx.dtypes = (left.shape, right.shape), (left.dtype, right.dtype)
        flat = codes(left, right).reshape(-1)
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % _ROW))
        ctx.save_for_backward(pack(flat.view(-1, _ROW), 2))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        codes = unpack(packed, 2, _ROW).view(-1)[: grad_output.numel()].view(grad_output.shape)
        shared = torch.where(codes == TIE, grad_output / 2, grad_output)
        grads: list[Tensor | None] = [None, None]
        for i, other in enumerate((RIGHT, LEFT)):
            if ctx.needs_input_grad[i]:
                grad = shared.masked_fill(codes == other, 0)
                grads[i] = grad.sum_to_size(ctx.shapes[i]).to(ctx.dtypes[i])
        return *grads, None, None


def choose(left: Tensor, right: Tensor, function: Callable[[Tensor, Tensor], Tensor], codes: Codes) -> Tensor:
    """`function(left, right)`, such as `torch.maximum`; `codes` is `larger` or `smaller`."""
    return ChoiceFunction.apply(left, right, function, codes)
