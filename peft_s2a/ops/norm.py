"""LayerNorm, RMSNorm and unit vectors: the normalised input is kept in codes, the reciprocal deviation in float32.

    x_hat = (x - mean) * rstd            y = gamma * x_hat + beta
    dx = rstd (g - mean(g) - x_hat mean(g x_hat)),   g = gamma * dy,   means over the normalised dimensions

RMSNorm is the same without the two means of x and g; `y = x / |x|` is RMSNorm with `gamma = 1 / sqrt(D)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.base import Codec
from ..codecs.chunked import chunk_bounds, decode_range, encode_chunked

Kind = Literal["layer", "rms", "unit"]


def _statistics(rows: Tensor, eps: float, kind: Kind) -> tuple[Tensor | None, Tensor]:
    """Mean `(M, 1)` (of LayerNorm only) and reciprocal deviation `(M, 1)` of `(M, D)`, float32 or float64."""
    if rows.numel() == 0:
        empty = rows.sum(-1, keepdim=True)
        return (empty if kind == "layer" else None), empty
    if kind == "layer":
        variance, mean = torch.var_mean(rows, dim=-1, correction=0, keepdim=True)
        return mean, (variance + eps).rsqrt_()
    if kind == "unit":
        return None, math.sqrt(rows.shape[-1]) / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min_(eps)
    return None, (rows.square().mean(-1, keepdim=True) + eps).rsqrt_()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class NormFunction(torch.autograd.Function):
    """Keeps x_hat through `codec` and one number a row; with the group-wise codec 4.5 bits per element at 4 bits."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        normalized_shape: Sequence[int],
        eps: float,
        kind: Kind,
        codec: Codec,
    ) -> Tensor:
        if kind == "layer":
            output = torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)
        elif kind == "unit":
            output = torch.nn.functional.normalize(input, dim=-1, eps=eps)
        else:
            output = torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)
        width = math.prod(normalized_shape)
        rows = input.reshape(-1, width)
        wide = _wide(input.dtype)
        deviations: list[Tensor] = []

        def normalised(start: int, stop: int) -> Tensor:
            piece = rows[start // width : stop // width].to(wide)
            mean, rstd = _statistics(piece, eps, kind)
            deviations.append(rstd)
            centre = piece if mean is None else piece - mean
            return (centre * rstd).reshape(-1)

        kept = encode_chunked(codec, rows.numel(), rows.device, normalised, unit=width)
        rstd = torch.cat(deviations) if len(deviations) != 1 else deviations[0]
        ctx.codec, ctx.width, ctx.kind = codec, width, kind
        ctx.input_dtype, ctx.normalized_shape = input.dtype, tuple(normalized_shape)
        ctx.save_for_backward(rstd, weight, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rstd, weight, *kept = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        width, codec = ctx.width, ctx.codec
        grad = grad_output.reshape(-1, width)
        wide = rstd.dtype
        gamma = None if weight is None else weight.reshape(-1).to(wide)
        grad_input = torch.empty(grad.shape, dtype=ctx.input_dtype, device=grad.device) if needs_input else None
        grad_weight = torch.zeros(width, dtype=wide, device=grad.device) if needs_weight else None
        if needs_input or needs_weight:
            for start, stop in chunk_bounds(grad.numel(), grad.device, codec.unit, width):
                rows = slice(start // width, stop // width)
                x_hat = decode_range(codec, tuple(kept), start, stop, wide).view(-1, width)
                g = grad[rows].to(wide)
                if grad_weight is not None:
                    grad_weight += (g * x_hat).sum(0)
                if grad_input is not None:
                    if gamma is not None:
                        g = g * gamma
                    elif ctx.kind == "unit":
                        g = g / math.sqrt(width)
                    projection = (g * x_hat).mean(-1, keepdim=True)
                    dx = torch.addcmul(g, x_hat, projection, value=-1)
                    if ctx.kind == "layer":
                        dx -= g.mean(-1, keepdim=True)
                    grad_input[rows] = dx.mul_(rstd[rows])
        grad_bias = grad.sum(0) if needs_bias else None
        if grad_weight is not None:
            grad_weight = grad_weight.view(weight.shape).to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.view(ctx.normalized_shape)
        if grad_input is not None:
            grad_input = grad_input.view(grad_output.shape)
        return grad_input, grad_weight, grad_bias, None, None, None, None


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    codec: Codec,
) -> Tensor:
    """`torch.nn.functional.layer_norm`; keeps x_hat through `codec`."""
    return NormFunction.apply(input, weight, bias, normalized_shape, eps, "layer", codec)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None, codec: Codec
) -> Tensor:
    """`torch.nn.functional.rms_norm`; keeps x_hat through `codec`."""
    if eps is None:
        eps = torch.finfo(_wide(input.dtype)).eps
    return NormFunction.apply(input, weight, None, normalized_shape, eps, "rms", codec)


def normalize(input: Tensor, eps: float, codec: Codec) -> Tensor:
    """`torch.nn.functional.normalize(input, dim=-1, eps=eps)`: unit vectors; keeps them through `codec`."""
    return NormFunction.apply(input, None, None, input.shape[-1:], eps, "unit", codec)
