"""Dropout: the mask is kept in one bit per element; values and gradients are bit-identical to torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.chunked import chunk_bounds, collect_chunks
from ..codecs.mask import decode_mask, encode_mask
from .ownership import owned

_UNIT = 1024


class DropoutFunction(torch.autograd.Function):
    """`y = x * noise`, `noise` zero with probability p and `1 / (1 - p)` else; keeps 1 bit per element."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, p: float) -> Tensor:
        if input.device.type == "cpu":
            # torch's own CPU dropout, draw for draw
            noise = torch.empty_like(input, memory_format=torch.preserve_format).bernoulli_(1 - p)
            output, mask = noise, noise
        else:
            output, mask = torch.native_dropout(input, p, True)
        ctx.keep = 1 - p
        flat = mask.reshape(-1)
        bounds = chunk_bounds(flat.numel(), flat.device, _UNIT)
        kept = collect_chunks(_UNIT, flat.numel(), bounds, lambda i, j: (encode_mask(flat[i:j].bool()),))
        ctx.save_for_backward(*kept)
        return output.div_(1 - p).mul_(input) if output is mask else output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        in_place = owned(grad_output) and grad_output.is_contiguous()
        (packed,) = ctx.saved_tensors
        grad = grad_output.reshape(-1)
        grad_input = grad if in_place else torch.empty_like(grad)
        factor = torch.ones((), dtype=grad.dtype, device=grad.device).div_(ctx.keep)
        for start, stop in chunk_bounds(grad.numel(), grad.device, _UNIT):
            mask = decode_mask(packed[start // _UNIT : -(-stop // _UNIT)], stop - start)
            torch.mul(grad[start:stop], mask * factor, out=grad_input[start:stop])
        return grad_output if in_place else grad_input.view(grad_output.shape), None


def dropout(input: Tensor, p: float) -> Tensor:
    """Dropout in training with `0 < p < 1`."""
    return DropoutFunction.apply(input, p)
