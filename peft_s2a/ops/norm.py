"""LayerNorm, RMSNorm and unit vectors: the normalised input is kept in codes, the reciprocal deviation in float32.

    x_hat = (x - mean) * rstd            y = gamma * x_hat + beta
    dx = rstd (g - mean(g) - x_hat mean(g x_hat)),   g = gamma * dy,   means over the normalised dimensions

RMSNorm is the same without the two means of x and g; `y = x / |x|` is RMSNorm with `gamma = 1 / sqrt(D)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..codecs.affine import GroupAffineCodec
from ..codecs.backend import compiles, run
from ..codecs.base import Codec
from ..codecs.chunked import chunk_bounds, decode_range, encode_chunked
from .ownership import owned

Kind = Literal["layer", "rms", "unit"]


def _statistics(rows: Tensor, eps: float, kind: Kind) -> tuple[Tensor | None, Tensor]:
    """Mean `(M, 1)` (of LayerNorm only) and reciprocal deviation `(M, 1)` of `(M, D)`, float32 or float64."""
    if rows.numel() == 0:
        empty = rows.sum(-1, keepdim=True)
        return (empty if kind == "layer" else None), empty
    if kind == "layer":
        _, mean, rstd = torch.native_layer_norm(rows, rows.shape[-1:], None, None, eps)
        return mean, rstd
    if kind == "unit":
        return None, math.sqrt(rows.shape[-1]) / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min_(eps)
    return None, (rows.square().mean(-1, keepdim=True) + eps).rsqrt_()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows_gradient(g: Tensor, x_hat: Tensor, rstd: Tensor, gamma: Tensor | None, kind: Kind) -> Tensor:
    """Gradient of the input of `(M, D)` rows."""
    if gamma is not None:
        g = g * gamma
    elif kind == "unit":
        g = g / math.sqrt(g.shape[-1])
    projection = (g * x_hat).mean(-1, keepdim=True)
    dx = g - x_hat * projection
    if kind == "layer":
        dx -= g.mean(-1, keepdim=True)
    return dx.mul_(rstd)


@dataclass(frozen=True)
class _Backward:
    codec: GroupAffineCodec
    kind: Kind


def _input_gradient(spec: _Backward, grad: Tensor, rstd: Tensor, gamma: Tensor | None, *kept: Tensor) -> Tensor:
    """Decodes and takes the gradient: a kernel. It writes over nothing: Inductor fails at that with some bits."""
    x_hat = spec.codec.decode_rows(kept, rstd.dtype)
    return _rows_gradient(grad.to(rstd.dtype), x_hat, rstd, gamma, spec.kind).to(grad.dtype)


@dataclass(frozen=True)
class _Forward:
    codec: GroupAffineCodec
    kind: Kind
    eps: float


def _normalise_and_encode(spec: _Forward, rows: Tensor, mean: Tensor | None, rstd: Tensor | None) -> tuple[Tensor, ...]:
    """Reciprocal deviation and codes of x_hat, from the statistics if they are known: a kernel."""
    values = rows.float()
    if rstd is None and spec.kind == "layer":
        mean = values.mean(-1, keepdim=True)
        rstd = ((values - mean).square().mean(-1, keepdim=True) + spec.eps).rsqrt()
    elif rstd is None:
        mean, rstd = _statistics(values, spec.eps, spec.kind)
    x_hat = values * rstd if mean is None else (values - mean) * rstd
    return rstd, *spec.codec.rows_to_codes(x_hat)


def _fuses(codec: Codec, rows: Tensor) -> TypeGuard[GroupAffineCodec]:
    """Whether one compiled kernel does it: codes that are packed row by row."""
    return isinstance(codec, GroupAffineCodec) and codec.row == rows.shape[1] and compiles(codec.backend, rows)


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
        kept_too: list[Tensor] | None,
    ) -> Tensor:
        wide = _wide(input.dtype)
        statistics: tuple[Tensor, Tensor] | None = None
        if kind == "layer" and input.dtype == wide and not torch.is_autocast_enabled(input.device.type):
            output, *found = torch.native_layer_norm(input, normalized_shape, weight, bias, eps)
            statistics = found[0].reshape(-1, 1), found[1].reshape(-1, 1)
        elif kind == "layer":
            output = torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)
        elif kind == "unit":
            output = torch.nn.functional.normalize(input, dim=-1, eps=eps)
        else:
            output = torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)
        width = math.prod(normalized_shape)
        rows = input.reshape(-1, width)
        ctx.codec, ctx.width, ctx.kind = codec, width, kind
        ctx.input_dtype, ctx.normalized_shape = input.dtype, tuple(normalized_shape)
        if _fuses(codec, rows) and codec.rounding == "nearest":
            mean, rstd = statistics or (None, None)
            rstd, *kept = run(codec.backend, _normalise_and_encode, _Forward(codec, kind, eps), rows, mean, rstd)
            ctx.save_for_backward(rstd, weight, *kept)
            if kept_too is not None:
                kept_too.extend(kept)
            return output
        deviations: list[Tensor] = []

        def normalised(start: int, stop: int) -> Tensor:
            piece = rows[start // width : stop // width].to(wide)
            if statistics is None:
                mean, rstd = _statistics(piece, eps, kind)
                deviations.append(rstd)
            else:
                mean, rstd = (t[start // width : stop // width] for t in statistics)
            return (piece * rstd if mean is None else (piece - mean).mul_(rstd)).reshape(-1)

        kept = encode_chunked(codec, rows.numel(), rows.device, normalised, unit=width)
        if statistics is not None:
            rstd = statistics[1]
        else:
            rstd = torch.cat(deviations) if len(deviations) != 1 else deviations[0]
        ctx.save_for_backward(rstd, weight, *kept)
        if kept_too is not None:
            kept_too.extend(kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        in_place = owned(grad_output)
        rstd, weight, *kept = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        width, codec = ctx.width, ctx.codec
        grad = grad_output.reshape(-1, width)
        wide = rstd.dtype
        gamma = None if weight is None else weight.reshape(-1).to(wide)
        grad_bias = grad.sum(0).view(ctx.normalized_shape) if needs_bias else None  # before grad is overwritten
        in_place = in_place and grad_output.is_contiguous() and grad.dtype == ctx.input_dtype
        grad_input = grad if needs_input and in_place else None
        grad_weight = torch.zeros(width, dtype=wide, device=grad.device) if needs_weight else None
        if needs_input and grad_input is None:
            grad_input = torch.empty(grad.shape, dtype=ctx.input_dtype, device=grad.device)
        fuses = grad_weight is None and _fuses(codec, grad)
        for start, stop in chunk_bounds(grad.numel(), grad.device, codec.unit, width):
            rows = slice(start // width, stop // width)
            if fuses and grad_input is not None:
                spec, codes = _Backward(codec, ctx.kind), (t[rows] for t in kept)
                grad_input[rows] = run(codec.backend, _input_gradient, spec, grad[rows], rstd[rows], gamma, *codes)
            elif needs_input or needs_weight:
                x_hat = decode_range(codec, tuple(kept), start, stop, wide).view(-1, width)
                g = grad[rows].to(wide)
                if grad_weight is not None:
                    grad_weight += (g * x_hat).sum(0)
                if grad_input is not None:
                    grad_input[rows] = _rows_gradient(g, x_hat, rstd[rows], gamma, ctx.kind)
        if grad_weight is not None:
            grad_weight = grad_weight.view(weight.shape).to(weight.dtype)
        if grad_input is not None:
            grad_input = grad_output if in_place else grad_input.view(grad_output.shape)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    codec: Codec,
    kept: list[Tensor] | None = None,
) -> Tensor:
    """`torch.nn.functional.layer_norm`; keeps x_hat through `codec`, and in the list `kept`."""
    return NormFunction.apply(input, weight, bias, normalized_shape, eps, "layer", codec, kept)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    codec: Codec,
    kept: list[Tensor] | None = None,
) -> Tensor:
    """`torch.nn.functional.rms_norm`; keeps x_hat through `codec`, and in the list `kept`."""
    if eps is None:
        eps = torch.finfo(_wide(input.dtype)).eps
    return NormFunction.apply(input, weight, None, normalized_shape, eps, "rms", codec, kept)


def normalize(input: Tensor, eps: float, codec: Codec) -> Tensor:
    """`torch.nn.functional.normalize(input, dim=-1, eps=eps)`: unit vectors; keeps them through `codec`."""
    return NormFunction.apply(input, None, None, input.shape[-1:], eps, "unit", codec, None)
