"""Products of backward with frozen float32 weights, with factors in bfloat16 and sums in float32.

What backward multiplies comes out of codes, or has gone through operators that decode them: it has lost more than
bfloat16 takes from it, and many devices multiply bfloat16 twice to sixteen times as fast as float32. That
goes for gradients and for products of forward that are taken again. The first run of a product is never short.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..pieces import piece_bounds
from .memory_order import no_view


@functools.cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32.

    Intel's processors do so in tiles (AMX) alone: without them, AVX512-BF16 takes twice as long there as float32.
    Others gain a factor of two from AVX512-BF16.
    """
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        known = torch.cpu.get_capabilities()
        intel = str(known.get("cpu_name", "")).startswith("Intel")
        return bool(known.get("amx_bf16") or (known.get("avx512_bf16") and not intel))
    return False


MIN_WORK, MIN_CHANNELS = 1 << 25, 128
"""Multiplications of a product, and channels on either side, from which on casting its factors pays (on a CPU)."""


def gains_from_short(input: Tensor, weight: Tensor) -> bool:
    """Whether the product of (..., width) and (channels, width) is faster in bfloat16."""
    return (
        input.dtype == weight.dtype == torch.float32
        and weight.dim() == 2
        and not is_traceable_wrapper_subclass(weight)  # weights in codes of others: they know how they are multiplied
        and min(weight.shape) >= MIN_CHANNELS
        and input.numel() * weight.shape[0] >= MIN_WORK
        and multiplies_bfloat16(weight.device)
    )


CPU_ROWS, DEVICE_ROWS = 512, 1 << 20
"""Rows of a gradient that are cast at a time on a CPU, and elsewhere."""

CPU_WEIGHTS, DEVICE_WEIGHTS = 3 << 18, 1 << 24
"""Elements of a weight that are cast at a time: 1.5 MB of bfloat16 on a CPU."""


def _pieces_of_weight(channels: int, other_channels: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Parts of the channels of a weight's one side, given how many the other side has."""
    elements = CPU_WEIGHTS if device.type == "cpu" else DEVICE_WEIGHTS
    return piece_bounds(channels, max(elements // max(other_channels, 1) // 64 * 64, 64))


def short_product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` of float32 tensors, with factors in bfloat16 where that is faster; no gradient is recorded.

    The weight is cast, and the product taken, a few output channels at a time.
    """
    if not gains_from_short(input, weight):
        return torch.nn.functional.linear(input, weight, bias)
    channels, width = weight.shape
    short = input.to(torch.bfloat16)
    output = torch.empty(*input.shape[:-1], channels, dtype=input.dtype, device=input.device)
    for start, stop in _pieces_of_weight(channels, width, weight.device):
        piece = output[..., start:stop]
        piece.copy_(torch.nn.functional.linear(short, weight[start:stop].to(torch.bfloat16)))
        if bias is not None:
            piece += bias[start:stop]
    return output


def short_gradient(grad_output: Tensor, weight: Tensor) -> Tensor:
    """`dy W` of float32 tensors, (..., channels) and (channels, width), with factors in bfloat16.

    Both are cast in pieces: nothing of the gradient's size is held beside it and the result.
    """
    channels, width = weight.shape
    grad = grad_output.reshape(-1, channels)
    result = torch.empty(len(grad), width, dtype=grad.dtype, device=grad.device)
    with torch.autocast(grad.device.type, enabled=False):
        for first, last in piece_bounds(len(grad), CPU_ROWS if grad.device.type == "cpu" else DEVICE_ROWS):
            rows = grad[first:last].to(torch.bfloat16)
            for start, stop in _pieces_of_weight(width, channels, weight.device):
                result[first:last, start:stop] = rows @ weight[:, start:stop].to(torch.bfloat16)
    return result.view(*grad_output.shape[:-1], width)


class ShortLinearFunction(torch.autograd.Function):
    """`y = x W^T + b` with W frozen, whose gradient is short, and y too if `again`; keeps W alone."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, again: bool) -> Tensor:
        ctx.save_for_backward(weight)
        product = short_product if again else torch.nn.functional.linear
        return no_view(product(input, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        grad_input = short_gradient(grad_output, weight) if ctx.needs_input_grad[0] else None
        grad_bias = grad_output.reshape(-1, weight.shape[0]).sum(0) if ctx.needs_input_grad[2] else None
        return grad_input, None, grad_bias, None


class _State(threading.local):
    again = False


_STATE = _State()


@contextmanager
def products_again(again: bool) -> Iterator[None]:
    """Inside, products of this thread are ones of forward that are taken again, from what comes out of codes."""
    before, _STATE.again = _STATE.again, again
    try:
        yield
    finally:
        _STATE.again = before


def short_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` with a frozen weight and a short gradient, for `gains_from_short`."""
    output: Tensor = ShortLinearFunction.apply(input, weight, bias, _STATE.again)
    return output
