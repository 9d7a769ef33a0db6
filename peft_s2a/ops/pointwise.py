"""Elementwise activation functions with a smooth derivative: the derivative's code is kept, `num_bits` per element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.backend import compiles, run
from ..codecs.base import Codec, Kept
from ..codecs.chunked import chunk_bounds, collect_chunks, decode_range
from ..codecs.levels import DerivativeCodec
from .memory_order import flatten, memory_permutation, same_memory, shares_memory, unflatten
from .overwriting import applied
from .ownership import owned


@dataclass(frozen=True)
class _Forward:
    """What the forward kernel is compiled for; the function is the one of the codec's derivative."""

    codec: DerivativeCodec
    overwrite: bool
    function: Callable[[Tensor], Tensor] = field(compare=False, repr=False)


def _values_and_codes(spec: _Forward, rows: Tensor) -> tuple[Tensor | None, Kept]:
    """Values (in place if `overwrite`) and codes of whole rows in one pass: a kernel."""
    values, kept = spec.function(rows), spec.codec.encode_rows(rows)
    if spec.overwrite:
        rows.copy_(values)
        return None, kept
    return values, kept


def _times_derivative(spec: tuple[DerivativeCodec, bool], grad: Tensor, *kept: Tensor) -> Tensor | None:
    """Gradient of whole rows (in place or not) in one pass over the codes: a kernel."""
    codec, in_place = spec
    product = (grad * codec.decode_rows(kept)).to(grad.dtype)
    if in_place:
        grad.copy_(product)
        return None
    return product


class PointwiseFunction(torch.autograd.Function):
    """`y = function(x)`; keeps what `codec` makes of x, of which it decodes `h'(x)`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, function: Callable[[Tensor], Tensor], codec: Codec, overwrite: bool) -> Tensor:
        ctx.codec = codec
        ctx.permutation = memory_permutation(input)
        flat = flatten(input, ctx.permutation)
        output: Tensor | None = None
        if _fuses(codec, flat):
            rows = flat.view(-1, codec.unit)
            output, kept = run(codec.backend, _values_and_codes, _Forward(codec, overwrite, function), rows)
            ctx.save_for_backward(*kept)
            if output is not None:
                return unflatten(output.view(-1), input.shape, ctx.permutation)
            return same_memory(input)

        def encode(start: int, stop: int) -> Kept:
            piece = flat[start:stop]
            kept = codec.encode(piece)
            if overwrite:
                piece.copy_(function(piece))
            return kept

        bounds = chunk_bounds(flat.numel(), flat.device, codec.unit)
        ctx.save_for_backward(*collect_chunks(codec.unit, flat.numel(), bounds, encode))
        return same_memory(input) if overwrite else applied(ctx, function, input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        in_place = owned(grad_output)
        codec, kept = ctx.codec, ctx.saved_tensors
        grad = flatten(grad_output, ctx.permutation)
        if _fuses(codec, grad):
            rows = grad.view(-1, codec.unit)
            product = run(codec.backend, _times_derivative, (codec, in_place), rows, *kept)
            grad_input = grad if product is None else product.view(-1)
            return unflatten(grad_input, grad_output.shape, ctx.permutation), None, None, None
        grad_input = grad if in_place else torch.empty_like(grad)
        for start, stop in chunk_bounds(grad.numel(), grad.device, codec.unit):
            derivative = decode_range(codec, kept, start, stop, grad.dtype)
            torch.mul(grad[start:stop], derivative, out=grad_input[start:stop])
        if in_place and shares_memory(grad, grad_output):
            return grad_output, None, None, None
        return unflatten(grad_input, grad_output.shape, ctx.permutation), None, None, None


def _fuses(codec: Codec, flat: Tensor) -> TypeGuard[DerivativeCodec]:
    """Whether a compiled kernel does value and code, or code and product, in one pass: on whole rows of a codec."""
    if not isinstance(codec, DerivativeCodec) or flat.numel() % codec.unit:
        return False
    return compiles(codec.backend, flat.view(-1, codec.unit))


def pointwise(input: Tensor, function: Callable[[Tensor], Tensor], codec: Codec, overwrite: bool = False) -> Tensor:
    """`function(input)`, elementwise; `codec` decodes its derivative (`DerivativeCodec`, `ExactDerivativeCodec`).

    The function may work in place and return its argument, unless the codec's backend compiles.

    Args:
        overwrite: the result takes the memory of `input`, piece by piece, without a full-size temporary. The caller
            answers for it: `input` is dense, no leaf, and nobody needs its content any more. (What autograd has kept of
            it becomes an error in backward.) The codec must not be one that keeps the input itself.
    """
    return PointwiseFunction.apply(input, function, codec, overwrite)
