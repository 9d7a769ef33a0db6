"""Elementwise functions whose derivative has two values: one bit per element, exact.

ReLU, ReLU6, Hardtanh, LeakyReLU, Hardsigmoid, threshold: `dx = slope * dy` where the mask is set, `other_slope * dy`
elsewhere, bit-identical to torch's own, but at NaN in Hardtanh, ReLU6 and the shrinking functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.base import Kept
from ..codecs.chunked import chunk_bounds, collect_chunks
from ..codecs.mask import decode_mask, encode_mask
from .memory_order import flatten, memory_permutation, same_memory, shares_memory, unflatten
from .overwriting import applied
from .ownership import owned

_UNIT = 1024

Mask = Callable[[Tensor], Tensor]


class MaskedFunction(torch.autograd.Function):
    """`y = function(x)`, with `y' = slope` where `mask(x)`, else `other_slope`; keeps 1 bit per element."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        function: Callable[[Tensor], Tensor],
        mask: Mask,
        slope: float,
        other_slope: float,
        overwrite: bool,
    ) -> Tensor:
        ctx.slopes = slope, other_slope
        ctx.permutation = memory_permutation(input)
        flat = flatten(input, ctx.permutation)

        def encode(start: int, stop: int) -> Kept:
            piece = flat[start:stop]
            packed = encode_mask(mask(piece))
            if overwrite:
                piece.copy_(function(piece))
            return (packed,)

        bounds = chunk_bounds(flat.numel(), flat.device, _UNIT)
        ctx.save_for_backward(*collect_chunks(_UNIT, flat.numel(), bounds, encode))
        return same_memory(input) if overwrite else applied(ctx, function, input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        in_place = owned(grad_output)
        grad_output = grad_output.resolve_neg()
        (packed,) = ctx.saved_tensors
        slope, other_slope = ctx.slopes
        grad = flatten(grad_output, ctx.permutation)
        grad_input = grad if in_place else torch.empty_like(grad)
        for start, stop in chunk_bounds(grad.numel(), grad.device, _UNIT):
            mask = decode_mask(packed[start // _UNIT : -(-stop // _UNIT)], stop - start)
            _select(grad[start:stop], mask, slope, other_slope, out=grad_input[start:stop])
        if in_place and shares_memory(grad, grad_output):
            return grad_output, None, None, None, None, None
        return unflatten(grad_input, grad_output.shape, ctx.permutation), None, None, None, None, None


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _select(grad: Tensor, mask: Tensor, slope: float, other_slope: float, out: Tensor) -> None:
    """Writes `grad * slope` where the mask is set, and elsewhere `grad * other_slope`, or 0 whatever the gradient is.

    Without `torch.where`, which takes five times as long on a CPU.
    """
    integers = _INTEGERS[grad.element_size()]
    all_bits = mask.view(torch.int8).neg().to(integers)
    outside = None
    if other_slope != 0:
        outside = (grad.view(integers) & ~all_bits).view(grad.dtype).mul_(other_slope)
    torch.bitwise_and(grad.view(integers), all_bits, out=out.view(integers))
    if slope != 1:
        out.mul_(slope)
    if outside is not None:
        out.add_(outside)  # one of both is zero


def compared(compare: Callable[..., Tensor], x: Tensor, bound: float) -> Tensor:
    """`compare(x, bound)` (`torch.le` and its kin) as bool.

    On a CPU comparisons are vectorised only where their result has the dtype of what they compare.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return compare(x, bound)
    return compare(x, bound, out=torch.empty_like(x)).bool()


def masked(
    input: Tensor,
    function: Callable[[Tensor], Tensor],
    mask: Mask,
    slope: float = 1.0,
    other_slope: float = 0.0,
    overwrite: bool = False,
) -> Tensor:
    """`function(input)`, elementwise; `function` may work in place and return its argument.

    Args:
        overwrite: the result takes the memory of `input`; see `pointwise`.
    """
    return MaskedFunction.apply(input, function, mask, slope, other_slope, overwrite)
