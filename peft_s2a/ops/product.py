"""Products of two activations: both factors are kept in codes (gates, eager attention)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.base import Codec, Kept
from ..codecs.chunked import decode_range, encode_chunked
from ..codecs.probability import KeptRows
from .memory_order import flatten, memory_permutation, unflatten


def _keep(codec: Codec, factor: Tensor) -> tuple[Kept, tuple[int, ...]]:
    permutation = memory_permutation(factor)
    if isinstance(codec, KeptRows):
        return codec.kept, permutation
    flat = flatten(factor, permutation)
    return encode_chunked(codec, flat.numel(), flat.device, lambda start, stop: flat[start:stop]), permutation


class ProductFunction(torch.autograd.Function):
    """`a * b` or `a @ b`; keeps each factor that the other's gradient needs, through its codec."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, is_matmul: bool, codecs: tuple[Codec, Codec]) -> Tensor:
        output = torch.matmul(left, right) if is_matmul else left * right
        ctx.is_matmul, ctx.codecs = is_matmul, codecs
        ctx.shapes, ctx.dtypes = (left.shape, right.shape), (left.dtype, right.dtype)
        needs_left, needs_right = ctx.needs_input_grad[:2]
        kept_left, ctx.left_order = _keep(codecs[0], left) if needs_right else ((), ())
        kept_right, ctx.right_order = _keep(codecs[1], right) if needs_left else ((), ())
        ctx.split = len(kept_left)
        ctx.save_for_backward(*kept_left, *kept_right)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        grads: list[Tensor | None] = [None, None]
        if ctx.needs_input_grad[0]:
            right = _restore(ctx.codecs[1], kept[ctx.split :], ctx.shapes[1], ctx.right_order, grad_output.dtype)
            grad = grad_output @ right.mT if ctx.is_matmul else grad_output * right
            grads[0] = grad.sum_to_size(ctx.shapes[0]).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            left = _restore(ctx.codecs[0], kept[: ctx.split], ctx.shapes[0], ctx.left_order, grad_output.dtype)
            grad = left.mT @ grad_output if ctx.is_matmul else grad_output * left
            grads[1] = grad.sum_to_size(ctx.shapes[1]).to(ctx.dtypes[1])
        return *grads, None, None


def _restore(codec: Codec, kept: Kept, shape: torch.Size, permutation: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return unflatten(decode_range(codec, kept, 0, shape.numel(), dtype), shape, permutation)


def multiply(left: Tensor, right: Tensor, codec: Codec, right_codec: Codec | None = None) -> Tensor:
    """`left * right`, broadcasting; both factors go through `codec` unless the right one has its own."""
    return ProductFunction.apply(left, right, False, (codec, right_codec or codec))


def matmul(left: Tensor, right: Tensor, codec: Codec, right_codec: Codec | None = None) -> Tensor:
    """`left @ right` of tensors with at least two dimensions each."""
    return ProductFunction.apply(left, right, True, (codec, right_codec or codec))
