"""Attention, whole or written out, and other products of activations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codecs.affine import GroupAffineCodec
from ..codecs.base import Codec, IdentityCodec
from ..codecs.channel import ChannelAffineCodec
from ..codecs.levels import DerivativeCodec
from ..codecs.probability import KeptRows, SqrtProbabilityCodec
from ..ops.attention import attention
from ..ops.derivatives import Silu
from ..ops.pointwise import pointwise
from ..ops.product import matmul, multiply
from ..ops.softmax import softmax
from .context import MIN_ELEMENTS, Context, applies, replaces


@replaces(F.scaled_dot_product_attention)
def _attention(
    context: Context,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if not applies(context, "attention", query, key, value) or query.dim() < 3:
        return NotImplemented
    lead = query.shape[:-3]
    if key.shape[:-3] != lead or value.shape[:-3] != lead:
        return NotImplemented
    if not enable_gqa and not query.shape[-3] == key.shape[-3] == value.shape[-3]:
        return NotImplemented
    if torch.compiler.is_compiling() and (dropout_p > 0 or (attn_mask is not None and attn_mask.requires_grad)):
        return NotImplemented  # neither the random state nor a gradient of the mask can be traced
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    codec = ChannelAffineCodec(context.bits("attention") or 0)
    recipe = None
    if attn_mask is not None and not attn_mask.requires_grad and not torch.compiler.is_compiling():
        recipe = context.recipes.get(attn_mask)
    if query.dim() == 4:
        return attention(query, key, value, attn_mask, options, codec, recipe)
    if attn_mask is not None:
        return NotImplemented
    q, k, v = (t.reshape(-1, *t.shape[-3:]) for t in (query, key, value))
    return attention(q, k, v, None, options, codec).view(*lead, *query.shape[-3:-1], value.shape[-1])


@replaces(F.softmax, torch.softmax, Tensor.softmax)
def _softmax(
    context: Context,
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
) -> Any:
    if (
        out is not None
        or dim is None
        or dim % max(input.dim(), 1) != input.dim() - 1
        or not applies(context, "softmax", input)
    ):
        return NotImplemented
    if dtype is None and isinstance(_stacklevel, torch.dtype):
        dtype = _stacklevel  # torch.softmax(input, dim, dtype)
    codec = SqrtProbabilityCodec(context.bits("softmax") or 0)
    if torch.compiler.is_compiling():
        return softmax(input, dtype, codec)
    kept: list[Tensor] = []
    output = softmax(input, dtype, codec, kept)
    if output.is_contiguous():
        context.rows[output] = KeptRows(codec, tuple(kept), output.shape[-1]), output._version
    return output


def _factor_codec(context: Context, factor: Tensor) -> Codec:
    """Codes for a large factor; a small one (the gates of a squeeze-and-excite) stays as it is."""
    if factor.numel() < MIN_ELEMENTS or factor.dtype == torch.float64:
        return IdentityCodec()
    if not torch.compiler.is_compiling() and factor in context.rows:
        kept, version = context.rows[factor]
        if version == factor._version:  # not changed in place since
            rows: KeptRows = kept
            return rows
    return GroupAffineCodec(context.bits("product") or 0)


def _are_activations(context: Context, left: Any, right: Any) -> bool:
    """Whether both are tensors with a gradient, and one of them large."""
    if not (isinstance(left, Tensor) and isinstance(right, Tensor) and left.requires_grad and right.requires_grad):
        return False
    return any(applies(context, "product", t) for t in (left, right))


@replaces(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def _matmul(context: Context, input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Any:
    if out is not None or input.dim() < 3 or other.dim() < 3 or not _are_activations(context, input, other):
        return NotImplemented
    return matmul(input, other, _factor_codec(context, input), _factor_codec(context, other))


@replaces(torch.bmm, Tensor.bmm)
def _bmm(context: Context, input: Tensor, mat2: Tensor, *, out: Tensor | None = None) -> Any:
    return _matmul(context, input, mat2, out=out)


@replaces(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply)
def _mul(context: Context, input: Any, other: Any, *, out: Tensor | None = None) -> Any:
    if out is not None:
        return NotImplemented
    if isinstance(other, (int, float)) and isinstance(input, Tensor):
        output = torch.mul(input, other)
        context.scaled.record(output, input, float(other))
        return output
    if not _are_activations(context, input, other):
        return NotImplemented
    for x, gate in ((input, other), (other, input)):
        known = context.sigmoids.get(gate)
        if known is not None and known[0] is x and context.bits("silu") is not None:
            # x * sigmoid(factor x), written out: QuickGELU and its kin
            return pointwise(x, lambda _: input * other, DerivativeCodec(Silu(known[1]), context.bits("silu") or 0))
    return multiply(input, other, _factor_codec(context, input), _factor_codec(context, other))
