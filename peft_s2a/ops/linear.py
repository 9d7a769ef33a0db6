"""Linear layers: with a frozen weight nothing of the input is kept, with a trained one its codes.

One whose result is added to something takes no memory for the result, and no pass over it: `add_linear`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.base import Codec
from ..codecs.chunked import CPU_CHUNK, DEVICE_CHUNK, decode_range, encode_chunked
from ..pieces import Bounds, piece_bounds
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


class AddLinearFunction(torch.autograd.Function):
    """`total + (x W^T + b)` as one product, with b as one more column of W; keeps x through `codec`."""

    @staticmethod
    def forward(
        ctx: Any,
        total: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        dim: int,
        in_place: bool,
        codec: Codec,
    ) -> Tensor:
        kept: tuple[Tensor, ...] = ()
        if any(ctx.needs_input_grad[2:4]):
            flat = input.reshape(-1)
            kept = encode_chunked(codec, flat.numel(), flat.device, lambda start, stop: flat[start:stop])
        ctx.dim, ctx.codec, ctx.shape = dim % total.dim(), codec, input.shape
        ctx.dtypes = input.dtype, weight.dtype, bias.dtype
        ctx.save_for_backward(weight, *kept)
        if not _is_dense(total, ctx.dim):
            total, in_place = total.contiguous(), False
        in_place = in_place and total._base is None
        output = total if in_place else torch.empty_like(total)
        before, after = _matrices(total, ctx.dim), _matrices(output, ctx.dim)
        columns = _with_ones(input, total.dtype)
        rows = torch.cat([weight, bias[:, None]], 1).to(total.dtype)
        with torch.autocast(total.device.type, enabled=False):
            if before.dim() == 2:
                torch.addmm(before, columns.flatten(0, -2), rows.T, out=after)
            else:
                torch.baddbmm(before, rows.expand(len(before), *rows.shape), columns.flatten(1, -2).mT, out=after)
        if in_place:
            ctx.mark_dirty(total)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        dense = grad_output if _is_dense(grad_output, ctx.dim) else grad_output.contiguous()
        grad = _matrices(dense, ctx.dim)
        wide = torch.promote_types(grad.dtype, torch.float32)
        wide_weight, size = weight.to(wide), (*grad.shape[: grad.dim() - 2], -1, weight.shape[1])
        grad_input = columns = None
        if ctx.needs_input_grad[1]:
            grad_input = torch.empty(ctx.shape, dtype=wide, device=grad.device)
        if any(ctx.needs_input_grad[2:4]):
            x = decode_range(ctx.codec, tuple(kept), 0, ctx.shape.numel(), ctx.dtypes[0])
            columns = _with_ones(x.view(size), wide)
        found = torch.zeros(weight.shape[0], weight.shape[1] + 1, dtype=wide, device=grad.device)
        for start, stop in _few_rows(grad):
            piece = grad[start:stop].to(wide)
            if grad_input is not None:
                grad_input.view(size)[start:stop] = _for_each_position(wide_weight.T, piece)
            if columns is not None:
                found += piece.T @ columns[start:stop] if piece.dim() == 2 else (piece @ columns[start:stop]).sum(0)
        if grad_input is not None:
            grad_input = grad_input.to(ctx.dtypes[0])
        if columns is None:
            return grad_output, grad_input, None, None, None, None, None
        grad_weight, grad_bias = found[:, :-1].to(ctx.dtypes[1]), found[:, -1].to(ctx.dtypes[2])
        return grad_output, grad_input, grad_weight, grad_bias, None, None, None


def _for_each_position(matrix: Tensor, features: Tensor) -> Tensor:
    """The product of (d, C) and the channels of features (N, C) or (B, C, N): (N, d) or (B, N, d)."""
    if features.dim() == 2:
        return features @ matrix.T
    return torch.bmm(matrix.expand(len(features), *matrix.shape), features).mT


def _is_dense(x: Tensor, dim: int) -> bool:
    """Whether features with C channels in `dim` are a matrix, or one for each item, as they lie in memory."""
    return x.is_contiguous() or x.movedim(dim, -1).is_contiguous()


def _matrices(x: Tensor, dim: int) -> Tensor:
    """A view of dense features: (N, C), or (B, C, N) where channels come first in memory."""
    last = x.movedim(dim, -1)
    return last.view(-1, x.shape[dim]) if last.is_contiguous() else x.view(*x.shape[:2], -1)


def _few_rows(matrices: Tensor) -> Bounds:
    """Rows, or items, that are worked on at a time; all of them where they need not be cast."""
    if matrices.element_size() >= 4 or torch.compiler.is_compiling():
        return iter([(0, len(matrices))])
    size = CPU_CHUNK if matrices.device.type == "cpu" else DEVICE_CHUNK
    return piece_bounds(len(matrices), size // max(matrices[:1].numel(), 1))


def _with_ones(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., d) as (..., d + 1)."""
    return torch.nn.functional.pad(x.to(dtype), (0, 1), value=1.0)


def add_linear(
    total: Tensor, input: Tensor, weight: Tensor, bias: Tensor, dim: int, in_place: bool, codec: Codec
) -> Tensor:
    """`peft_s2a.structure.add_linear`, in the memory of `total` if that is wanted and possible."""
    output: Tensor = AddLinearFunction.apply(total, input, weight, bias, dim, in_place, codec)
    return output
