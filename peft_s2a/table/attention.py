"""Attention, whole or written out, and other products of activations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codecs.base import Codec, IdentityCodec
from ..codecs.channel import ChannelAffineCodec, HeadCodec, IdentityHeadCodec
from ..codecs.levels import DerivativeCodec
from ..codecs.probability import KeptRows, SqrtProbabilityCodec
from ..ops.attention import Heads, attention
from ..ops.derivatives import Silu
from ..ops.lineage import compile_program
from ..ops.logsumexp import logsumexp
from ..ops.pointwise import pointwise
from ..ops.product import RebuiltFactor, matmul, multiply
from ..ops.softmax import softmax
from ..settings import ATTENTION_PARTS
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
    coded = [applies(context, kind, query, key, value) for kind in ATTENTION_PARTS]
    if min(query.dim(), key.dim(), value.dim()) < 3 or not any(coded):
        return NotImplemented
    query, key, value = _same_batch(query, key, value, 3 if enable_gqa else 2)
    if torch.compiler.is_compiling() and (dropout_p > 0 or (attn_mask is not None and attn_mask.requires_grad)):
        return NotImplemented  # neither the random state nor a gradient of the mask can be traced
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    recipe = None
    if attn_mask is not None and not attn_mask.requires_grad and not torch.compiler.is_compiling():
        recipe = context.recipes.get(attn_mask)
    if query.dim() == 4:
        heads = _heads(context, query, key, value)
        return attention(query, key, value, attn_mask, options, None, recipe, heads)
    lead = query.shape[:-3]
    if attn_mask is not None and attn_mask.dim() > 3:
        attn_mask, recipe = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4), None
    q, k, v = (t.reshape(-1, *t.shape[-3:]) for t in (query, key, value))
    output = attention(q, k, v, attn_mask, options, None, recipe, Heads(_head_codecs(context, q, k, v)))
    return output.view(*lead, *query.shape[-3:-1], value.shape[-1])


def _same_batch(query: Tensor, key: Tensor, value: Tensor, own: int) -> tuple[Tensor, ...]:
    """The tensors expanded to a common shape, but for the last `own` dimensions."""
    shapes = [t.shape[:-own] for t in (query, key, value)]
    if shapes[0] == shapes[1] == shapes[2]:
        return query, key, value
    common = torch.broadcast_shapes(*shapes)
    return tuple(t.expand(*common, *t.shape[-own:]) for t in (query, key, value))


def _head_codecs(context: Context, *tensors: Tensor | None) -> tuple[HeadCodec, ...]:
    """The codecs of q, k and v; None stands for one that is not kept."""
    codecs: list[HeadCodec] = []
    for kind, tensor in zip(ATTENTION_PARTS, tensors, strict=True):
        bits = context.bits(kind)
        if bits is None:
            codecs.append(IdentityHeadCodec())
            continue
        codecs.append(ChannelAffineCodec(bits, context.settings.rounding, context.settings.backend))
        if tensor is not None:
            context.count(kind, tensor.numel())
    return tuple(codecs)


def _heads(context: Context, *tensors: Tensor) -> Heads:
    """Those of q, k and v whose origin is known are rebuilt from it, the others kept in codes."""
    nodes = [context.origin(part, t) for part, t in zip(ATTENTION_PARTS, tensors, strict=True)]
    known = [node for node in nodes if node is not None]
    kept = [tensor if node is None else None for tensor, node in zip(tensors, nodes, strict=True)]
    codecs = _head_codecs(context, *kept)
    if not known:
        return Heads(codecs)
    program, leaves = compile_program(known)
    return Heads(codecs, program, tuple(leaves), tuple(node is not None for node in nodes))  # type: ignore[arg-type]


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
    if out is not None or dim is None or not applies(context, "softmax", input):
        return NotImplemented
    if dtype is None and isinstance(_stacklevel, torch.dtype):
        dtype = _stacklevel  # torch.softmax(input, dim, dtype)
    codec = SqrtProbabilityCodec(context.bits("softmax") or 8, context.settings.rounding)
    if torch.compiler.is_compiling() or dim % input.dim() != input.dim() - 1:
        return softmax(input, dtype, codec, dim=dim)
    kept: list[Tensor] = []
    output = softmax(input, dtype, codec, kept)
    if output.is_contiguous():
        context.rows[output] = KeptRows(codec, tuple(kept), output.shape[-1]), output._version
    return output


@replaces(torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp)
def _logsumexp(
    context: Context, input: Tensor, dim: Any = None, keepdim: bool = False, *, out: Tensor | None = None
) -> Any:
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    if out is not None or not isinstance(dim, int) or not applies(context, "softmax", input):
        return NotImplemented
    return logsumexp(input, dim, keepdim, SqrtProbabilityCodec(context.bits("softmax") or 8, context.settings.rounding))


def _factor_codec(context: Context, factor: Tensor) -> Codec | RebuiltFactor:
    """Codes for a large factor, or how it is made again; a small one (a squeeze-and-excite's gates) stays as it is."""
    if factor.numel() < MIN_ELEMENTS or factor.dtype == torch.float64:
        return IdentityCodec()
    if not torch.compiler.is_compiling() and factor in context.rows:
        kept, version = context.rows[factor]
        if version == factor._version:  # not changed in place since
            rows: KeptRows = kept
            return rows
    node = context.origin("product", factor)
    if node is not None:
        program, leaves = compile_program([node])
        return RebuiltFactor(program, tuple(leaves))
    return context.affine("product")


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
