"""Activation functions whose input is made again in backward: nothing is kept for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.chunked import CPU_CHUNK, DEVICE_CHUNK
from ..pieces import piece_bounds
from .derivatives import Derivative, times_derivative
from .lineage import Items, Program, Span
from .overwriting import write_over
from .ownership import owned


def spans(count: int, numel: int, device: torch.device) -> Iterator[Span]:
    """Splits the items of a tensor of `numel` elements into pieces that bear the temporaries of a product."""
    size = 4 * CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK
    step = max(1, size * count // max(numel, 1))
    return piece_bounds(count, step)


def piece(tensor: Tensor, items: Items, span: Span) -> Tensor:
    """The items of a span: a view."""
    return tensor.narrow(items.dim, span[0] * items.factor, (span[1] - span[0]) * items.factor)


class RebuiltPointwiseFunction(torch.autograd.Function):
    """`y = function(x)`; x comes from a program, a few items at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        function: Callable[[Tensor], Tensor],
        derivative: Derivative,
        program: Program,
        leaves: Sequence[Tensor],
        overwrite: bool,
    ) -> Tensor:
        ctx.derivative, ctx.program = derivative, program
        ctx.save_for_backward(*leaves)
        if overwrite:
            return write_over(input, function)
        output = function(input)
        if output is input:
            ctx.mark_dirty(input)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        in_place = owned(grad_output)
        leaves, program = ctx.saved_tensors, ctx.program
        items = program.items[0]
        if program.count is None or items is None:
            (x,) = program.run(leaves)
            return times_derivative(ctx.derivative, grad_output, x), None, None, None, None, None
        grad_input = grad_output if in_place else torch.empty_like(grad_output)
        for span in spans(program.count, math.prod(grad_output.shape), grad_output.device):
            (x,) = program.run(leaves, span)
            grad = piece(grad_output, items, span)
            times_derivative(ctx.derivative, grad, x.to(grad.dtype), out=piece(grad_input, items, span))
        return grad_input, None, None, None, None, None


def rebuilt_pointwise(
    input: Tensor,
    function: Callable[[Tensor], Tensor],
    derivative: Derivative,
    program: Program,
    leaves: Sequence[Tensor],
    overwrite: bool = False,
) -> Tensor:
    """`function(input)`, elementwise.

    Args:
        derivative: of the function.
        program, leaves: how the input is made again (`compile_program`).
        overwrite: whether the result may take the input's memory.
    """
    return RebuiltPointwiseFunction.apply(input, function, derivative, program, leaves, overwrite)
