"""Layer, RMS, group and batch norms, and unit vectors."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codecs.affine import ROW, GroupAffineCodec
from ..ops.batch_norm import batch_norm
from ..ops.group_norm import group_norm, instance_norm
from ..ops.lineage import normalised_node
from ..ops.norm import layer_norm, normalize, rms_norm
from .context import Context, applies, replaces


def _codec(context: Context, kind: str, width: int) -> GroupAffineCodec:
    """Codes of normalised rows, packed row by row where a row is made of whole groups and long enough."""
    row = width if width % 128 == 0 and 256 <= width <= 4 * ROW else ROW
    group_size = 128 if kind == "source" and context.bits(kind) == 8 else 64  # 8 bits bear wider groups
    return context.affine(kind, group_size, row)


@replaces(F.layer_norm, torch.layer_norm)
def _layer_norm(
    context: Context,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    kind = "source" if context.rebuilds() else "norm"
    if not applies(context, kind, input):
        return NotImplemented
    codec = _codec(context, kind, math.prod(normalized_shape))
    kept: list[Tensor] | None = [] if kind == "source" else None
    output = layer_norm(input, normalized_shape, weight, bias, eps, codec, kept)
    if kept is not None:
        context.lineage.put(output, normalised_node(output, codec, tuple(kept), weight, bias, context.name(kind)))
    return output


@replaces(F.rms_norm, torch.rms_norm)
def _rms_norm(
    context: Context, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Any:
    kind = "source" if context.rebuilds() else "norm"
    if not applies(context, kind, input):
        return NotImplemented
    codec = _codec(context, kind, math.prod(normalized_shape))
    kept: list[Tensor] | None = [] if kind == "source" else None
    output = rms_norm(input, normalized_shape, weight, eps, codec, kept)
    if kept is not None:
        context.lineage.put(output, normalised_node(output, codec, tuple(kept), weight, None, context.name(kind)))
    return output


@replaces(F.normalize)
def _normalize(
    context: Context, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Any:
    if eps > 1e-5:  # rows below eps are divided by it, which has another derivative
        return NotImplemented
    if p != 2 or dim % input.dim() != input.dim() - 1 or out is not None or not applies(context, "norm", input):
        return NotImplemented
    return normalize(input, eps, _codec(context, "norm", input.shape[-1]))


@replaces(F.group_norm, torch.group_norm)
def _group_norm(
    context: Context,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    if not applies(context, "norm", input) or input.dim() < 2 or input.shape[1] % num_groups:
        return NotImplemented  # the last two are torch's own errors
    codec = _codec(context, "norm", input.shape[1:].numel() // num_groups)
    return group_norm(input, num_groups, weight, bias, eps, codec)


@replaces(F.instance_norm)
def _instance_norm(
    context: Context,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if running_mean is not None or not use_input_stats or input.dim() < 3 or not applies(context, "norm", input):
        return NotImplemented
    return instance_norm(input, weight, bias, eps, _codec(context, "norm", input.shape[2:].numel()))


@replaces(F.batch_norm)
def _batch_norm(
    context: Context,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training:
        if not applies(context, "norm", input):
            return NotImplemented
    elif weight is not None and weight.requires_grad:
        return NotImplemented
    codec = context.affine("norm", group_size=128)
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, codec)
