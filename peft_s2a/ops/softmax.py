"""Softmax along a dimension: probabilities are kept in codes of their square roots.

dx = P (dy - sum(dy P)), with the same decoded P in both places, so that the rows of dx sum to zero
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.chunked import CPU_CHUNK, DEVICE_CHUNK
from ..codecs.probability import RowCodec
from ..pieces import piece_bounds
from .ownership import owned


def row_pieces(matrix: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of rows of an `(R, C)` tensor that are encoded or decoded at a time."""
    rows, width = matrix.shape
    size = CPU_CHUNK if matrix.device.type == "cpu" else DEVICE_CHUNK
    step = max(rows, 1) if torch.compiler.is_compiling() else max(1, size // max(width, 1))
    return piece_bounds(rows, step)


class SoftmaxFunction(torch.autograd.Function):
    """Keeps the probabilities through `codec`."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, dim: int, dtype: torch.dtype | None, codec: RowCodec, sink: list[Tensor] | None
    ) -> Tensor:
        output = torch.softmax(input, dim, dtype)
        rows = output.movedim(dim, -1).reshape(-1, output.shape[dim])
        ctx.codec, ctx.input_dtype, ctx.dim = codec, input.dtype, dim
        parts = [codec.encode(rows[start:stop]) for start, stop in row_pieces(rows)]
        kept = [torch.cat(column) if len(column) > 1 else column[0] for column in zip(*parts, strict=True)]
        ctx.save_for_backward(*kept)
        if sink is not None:
            sink.extend(kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        in_place = owned(grad_output) and grad_output.dtype == ctx.input_dtype
        kept = ctx.saved_tensors
        width = grad_output.shape[ctx.dim]
        moved = grad_output.movedim(ctx.dim, -1)
        in_place = in_place and moved.is_contiguous()  # else `grad` is a copy
        grad = moved.reshape(-1, width)
        grad_input = grad if in_place else torch.empty(grad.shape, dtype=ctx.input_dtype, device=grad.device)
        for start, stop in row_pieces(grad):
            p = ctx.codec.decode(tuple(t[start:stop] for t in kept), width, grad.dtype)
            g = grad[start:stop]
            grad_input[start:stop] = p * (g - (g * p).sum(-1, keepdim=True))
        if in_place:
            return grad_output, None, None, None, None
        return grad_input.view(moved.shape).movedim(-1, ctx.dim), None, None, None, None


def softmax(
    input: Tensor, dtype: torch.dtype | None, codec: RowCodec, sink: list[Tensor] | None = None, dim: int = -1
) -> Tensor:
    """`torch.softmax(input, dim, dtype)`; what is kept is also put into `sink`, for products with the result."""
    return SoftmaxFunction.apply(input, dim, dtype, codec, sink)
