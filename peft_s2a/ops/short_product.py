"""Products in bfloat16 where their factors come out of codes: the second run of a product that ran in full before.

A factor that was decoded from 8 bits or fewer has lost more than bfloat16 takes from it, and a device that multiplies
bfloat16 does so twice to sixteen times as fast as float32. Gradients are never taken in bfloat16: these are products
of forward alone, whose results decide what is decoded further on.
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

from ..pieces import piece_bounds


@functools.cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions that multiply bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


CPU_WEIGHTS = 3 << 18
"""Elements of a weight that are cast at a time on a CPU: 1.5 MB of bfloat16."""

DEVICE_WEIGHTS = 1 << 24
"""The same elsewhere."""


def short_product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear(input, weight, bias)` of float32 tensors, with factors in bfloat16 where that is faster.

    No gradient is recorded. The weight is cast, and the product taken, a few output channels at a time.
    """
    if weight.dtype != torch.float32 or not multiplies_bfloat16(weight.device):
        return torch.nn.functional.linear(input, weight, bias)
    channels, width = weight.shape
    short = input.to(torch.bfloat16)
    output = torch.empty(*input.shape[:-1], channels, dtype=input.dtype, device=input.device)
    step = (CPU_WEIGHTS if weight.device.type == "cpu" else DEVICE_WEIGHTS) // max(width, 1) // 64 * 64
    for start, stop in piece_bounds(channels, max(step, 64)):
        piece = output[..., start:stop]
        piece.copy_(torch.nn.functional.linear(short, weight[start:stop].to(torch.bfloat16)))
        if bias is not None:
            piece += bias[start:stop]
    return output


class ShortLinearFunction(torch.autograd.Function):
    """`y = x W^T + b` by `short_product`, with the gradients of the full product; keeps W alone, which is frozen."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return short_product(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (weight,) = ctx.saved_tensors
        grad_input = torch.matmul(grad_output, weight) if ctx.needs_input_grad[0] else None
        grad_bias = grad_output.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return grad_input, None, grad_bias


class _State(threading.local):
    active = False


_STATE = _State()


@contextmanager
def short_products(active: bool) -> Iterator[None]:
    """Inside, frozen linear layers of this thread may use `short_linear`."""
    before, _STATE.active = _STATE.active, active
    try:
        yield
    finally:
        _STATE.active = before


def short_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The output of a linear layer with a frozen weight, or None where the full product is to be taken."""
    if not _STATE.active or input.dtype != torch.float32 or weight.dtype != torch.float32 or input.dim() < 2:
        return None
    if not multiplies_bfloat16(input.device):
        return None
    output: Tensor = ShortLinearFunction.apply(input, weight, bias)
    return output
