"""logsumexp: `dx = dy softmax(x)`; the probabilities are kept in the codes of a softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.probability import RowCodec
from .softmax import row_pieces


class LogSumExpFunction(torch.autograd.Function):
    """`logsumexp(x, dim)`; keeps the softmax along `dim` through `codec`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, dim: int, keepdim: bool, codec: RowCodec) -> Tensor:
        output = torch.logsumexp(input, dim, keepdim)
        rows = input.movedim(dim, -1)
        ctx.shape, ctx.dtype, ctx.dim, ctx.keepdim, ctx.codec = rows.shape, input.dtype, dim, keepdim, codec
        rows = rows.reshape(-1, rows.shape[-1])
        parts = [codec.encode(rows[start:stop].softmax(-1)) for start, stop in row_pieces(rows)]
        ctx.save_for_backward(*(torch.cat(column) for column in zip(*parts, strict=True)))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        kept = ctx.saved_tensors
        grad = (grad_output.squeeze(ctx.dim) if ctx.keepdim else grad_output).reshape(-1, 1)
        grad_input = torch.empty(ctx.shape, dtype=ctx.dtype, device=grad.device)
        rows = grad_input.view(-1, ctx.shape[-1])
        for start, stop in row_pieces(rows):
            p = ctx.codec.decode(tuple(t[start:stop] for t in kept), ctx.shape[-1], grad.dtype)
            rows[start:stop] = p * grad[start:stop]
        return grad_input.movedim(-1, ctx.dim), None, None, None


def logsumexp(input: Tensor, dim: int, keepdim: bool, codec: RowCodec) -> Tensor:
    """`torch.logsumexp` along one dimension."""
    return LogSumExpFunction.apply(input, dim, keepdim, codec)
