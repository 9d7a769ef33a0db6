"""Products of two activations: both factors are kept in codes (gates, eager attention)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.base import Codec, Kept
from ..codecs.chunked import chunk_bounds, decode_range, encode_chunked
from ..codecs.probability import KeptRows
from .lineage import Program
from .memory_order import flatten, memory_permutation, shares_memory, unflatten
from .ownership import owned


@dataclass(frozen=True)
class RebuiltFactor:
    """In a codec's place: the factor is made again from `leaves`."""

    program: Program
    leaves: Kept


Keeper = Codec | RebuiltFactor


def _keep(codec: Keeper, factor: Tensor) -> tuple[Kept, tuple[int, ...]]:
    permutation = memory_permutation(factor)
    if isinstance(codec, RebuiltFactor):
        return codec.leaves, permutation
    if isinstance(codec, KeptRows):
        return codec.kept, permutation
    flat = flatten(factor, permutation)
    return encode_chunked(codec, flat.numel(), flat.device, lambda start, stop: flat[start:stop]), permutation


class ProductFunction(torch.autograd.Function):
    """`a * b` or `a @ b`; keeps each factor that the other's gradient needs, through its codec."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, is_matmul: bool, codecs: tuple[Keeper, Keeper]) -> Tensor:
        output = torch.matmul(left, right) if is_matmul else left * right
        ctx.is_matmul = is_matmul
        ctx.shapes, ctx.dtypes = (left.shape, right.shape), (left.dtype, right.dtype)
        needs_left, needs_right = ctx.needs_input_grad[:2]
        kept_left, ctx.left_order = _keep(codecs[0], left) if needs_right else ((), ())
        kept_right, ctx.right_order = _keep(codecs[1], right) if needs_left else ((), ())
        ctx.split = len(kept_left)
        # what is kept belongs to the graph alone
        ctx.codecs = tuple(replace(c, leaves=()) if isinstance(c, RebuiltFactor) else c for c in codecs)
        ctx.save_for_backward(*kept_left, *kept_right)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        in_place = owned(grad_output)
        kept, dtype = ctx.saved_tensors, grad_output.dtype
        others = (ctx.codecs[1], kept[ctx.split :], ctx.right_order), (ctx.codecs[0], kept[: ctx.split], ctx.left_order)
        grads: list[Tensor | None] = [None, None]
        for side in (0, 1):
            if not ctx.needs_input_grad[side]:
                continue
            codec, codes, order = others[side]
            last = side == 1 or not ctx.needs_input_grad[1]
            if not ctx.is_matmul and ctx.shapes[0] == ctx.shapes[1] and not isinstance(codec, RebuiltFactor):
                grad = _times(grad_output, codec, codes, order, in_place and last)
            else:
                other = _restore(codec, codes, ctx.shapes[1 - side], order, dtype)
                if not ctx.is_matmul:
                    grad = grad_output * other
                else:
                    grad = other.mT @ grad_output if side else grad_output @ other.mT
            grads[side] = grad.sum_to_size(ctx.shapes[side]).to(ctx.dtypes[side])
        return *grads, None, None


def _times(grad: Tensor, codec: Codec, codes: Kept, order: tuple[int, ...], in_place: bool) -> Tensor:
    """`grad * factor`, piece by piece, over the memory of `grad` if that may be."""
    flat = flatten(grad, order)
    in_place = in_place and shares_memory(flat, grad)
    product = flat if in_place else torch.empty_like(flat)
    for start, stop in chunk_bounds(flat.numel(), flat.device, codec.unit):
        torch.mul(flat[start:stop], decode_range(codec, codes, start, stop, grad.dtype), out=product[start:stop])
    return grad if in_place else unflatten(product, grad.shape, order)


def _restore(codec: Keeper, kept: Kept, shape: torch.Size, permutation: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if isinstance(codec, RebuiltFactor):
        return codec.program.run(kept)[0].to(dtype)
    return unflatten(decode_range(codec, kept, 0, shape.numel(), dtype), shape, permutation)


def multiply(left: Tensor, right: Tensor, codec: Keeper, right_codec: Keeper | None = None) -> Tensor:
    """`left * right`, broadcasting; both factors go through `codec` unless the right one has its own."""
    return ProductFunction.apply(left, right, False, (codec, right_codec or codec))


def matmul(left: Tensor, right: Tensor, codec: Keeper, right_codec: Keeper | None = None) -> Tensor:
    """`left @ right` of tensors with at least two dimensions each."""
    return ProductFunction.apply(left, right, True, (codec, right_codec or codec))
