"""Layer, RMS, group and batch norms, and unit vectors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codecs.affine import GroupAffineCodec
from ..ops.batch_norm import batch_norm
from ..ops.norm import layer_norm, normalize, rms_norm
from .context import Context, applies, replaces


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
    if not applies(context, "norm", input):
        return NotImplemented
    return layer_norm(input, normalized_shape, weight, bias, eps, GroupAffineCodec(context.bits("norm") or 0))


@replaces(F.rms_norm, torch.rms_norm)
def _rms_norm(
    context: Context, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Any:
    if not applies(context, "norm", input):
        return NotImplemented
    return rms_norm(input, normalized_shape, weight, eps, GroupAffineCodec(context.bits("norm") or 0))


@replaces(F.normalize)
def _normalize(
    context: Context, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Any:
    if eps > 1e-5:  # rows below eps are divided by it, which has another derivative
        return NotImplemented
    if p != 2 or dim % input.dim() != input.dim() - 1 or out is not None or not applies(context, "norm", input):
        return NotImplemented
    return normalize(input, eps, GroupAffineCodec(context.bits("norm") or 0))


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
    if not applies(context, "norm", input) or (weight is not None and weight.requires_grad):
        return NotImplemented
    if input.shape[1] % num_groups:
        return NotImplemented  # torch's own error
    # every group of an item is a row of a layer norm; gamma and beta follow for each channel
    rows = input.reshape(input.shape[0] * num_groups, -1)
    codec = GroupAffineCodec(context.bits("norm") or 0)
    output = layer_norm(rows, rows.shape[1:], None, None, eps, codec).view(input.shape)
    shape = (1, -1) + (1,) * (input.dim() - 2)
    if weight is not None:
        output = output * weight.view(shape)
    if bias is not None:
        output = output + bias.view(shape)
    return output.to(input.dtype)


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
    codec = GroupAffineCodec(context.bits("norm") or 8, group_size=128)
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, codec)
