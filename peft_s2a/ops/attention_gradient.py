"""Gradients of q, k and v of an attention by formula, from q, k and v.

With P = softmax(q k^T scale + mask) and dS = P (dy v^T - sum(dy v^T P)):  dv = P^T dy,  dq = dS k scale,
dk = dS^T q scale. These are five products; torch's own backward asks for the output as well, which takes two more.
Unlike torch's it holds probabilities: it is for a few heads at a time. In 16 bits, which torch's own attention casts
back and forth on a CPU, the two inner products are in float32 and the other three in bfloat16 where that is fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..pieces import piece_bounds
from .short_product import multiplies_bfloat16

MAX_SCORES = 1 << 19
"""L x S of a head up to which the formula is faster on a CPU than torch's attention and its backward."""

PIECE_SCORES = 3 << 17
"""Scores that are there at a time on a CPU: 1.5 MB of float32, twice."""


def prefers_formula(
    query: tuple[int, ...], key: tuple[int, ...], device: torch.device, options: dict[str, Any]
) -> bool:
    """Whether the formula is the faster way: short sequences on a CPU.

    Args:
        query, key: shapes, `(N, H, L, D)` and `(N, H', S, D)`.
    """
    return device.type == "cpu" and options["dropout_p"] == 0 and query[2] * key[2] <= MAX_SCORES


def formula_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the last three products, on a CPU; the first two and the probabilities are in float32 at least."""
    if dtype == torch.bfloat16 and multiplies_bfloat16(device):
        return dtype
    return torch.promote_types(dtype, torch.float32)


def items_by_formula(query: tuple[int, ...], key: tuple[int, ...]) -> int:
    """Batch items whose scores are there at a time."""
    return max(1, PIECE_SCORES // max(query[1] * query[2] * key[2], 1))


def attention_gradients(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any], grad_output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q `(N, H, L, D)`, k `(N, H', S, D)` and v `(N, H', S, E)`, in their dtypes. No dropout.

    Args:
        mask: broadcasts to `(N, H, L, S)`: added, or of bool.
        options: `is_causal`, `scale`, `enable_gqa` of torch's function.
        grad_output: `(N, H, L, E)`.
    """
    groups = query.shape[1] // key.shape[1] if options["enable_gqa"] else 1
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    wide = torch.promote_types(query.dtype, torch.float32)
    # Rounded to 16 bits, large scores and the differences of dy v^T would lose more than a softmax forgives. A GPU's
    # products are not slowed down for it.
    careful = wide if query.device.type == "cpu" else query.dtype
    scaled = query.to(careful) * scale
    scores = (scaled @ key.to(careful).mT).to(wide)
    scaled = scaled.to(query.dtype)
    nowhere: Tensor | None = None  # rows that may look nowhere: torch's output and gradients are zero there
    if options["is_causal"]:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores.masked_fill_(~allowed, -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -math.inf)
        nowhere = ~mask.any(-1, keepdim=True)
    elif mask is not None:
        scores += mask
        nowhere = (mask == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(scores, -1)
    del scores
    if nowhere is not None:
        p.masked_fill_(nowhere, 0.0)
    grad_value = p.to(query.dtype).mT @ grad_output
    grad_scores = (grad_output.to(careful) @ value.to(careful).mT).to(wide).mul_(p)
    grad_scores.addcmul_(p, grad_scores.sum(-1, keepdim=True), value=-1)
    del p
    grad_scores = grad_scores.to(query.dtype)
    grad_query, grad_key = (grad_scores @ key).mul_(scale), grad_scores.mT @ scaled
    if groups > 1:
        grad_key, grad_value = (torch.unflatten(g, 1, (-1, groups)).sum(2) for g in (grad_key, grad_value))
    return grad_query, grad_key, grad_value


def gradients_by_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    grad_output: Tensor,
    grads: Sequence[Tensor | None],
) -> None:
    """Writes `attention_gradients` to those of `grads` that there are, a few heads at a time (`PIECE_SCORES`).

    q, k, v and `grad_output` come in one dtype, that of the products; `grads` may be in others.
    """
    _, heads, length, _ = query.shape
    groups = key.shape[1]
    shared = heads // max(groups, 1)
    # by the scores of one item: where a piece has several items, all their heads fit
    pieces = min(groups, math.ceil(heads * length * key.shape[2] / PIECE_SCORES))
    for start, stop in piece_bounds(heads, math.ceil(groups / max(pieces, 1)) * shared):
        q, k = slice(start, stop), slice(start // shared, stop // shared)
        piece_mask = mask if mask is None or mask.dim() < 3 or mask.shape[-3] == 1 else mask[..., q, :, :]
        found = attention_gradients(query[:, q], key[:, k], value[:, k], piece_mask, options, grad_output[:, q])
        for grad, part, place in zip(grads, found, (q, k, k), strict=True):
            if grad is not None:
                grad[:, place] = part
