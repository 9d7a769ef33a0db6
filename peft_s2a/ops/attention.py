"""Scaled-dot-product attention: q, k and v are kept in codes, the attention is recomputed from them in backward.

Where it is known how they came from a normalised input (see `lineage.py`), they are made again from that instead.
Neither the probabilities nor the output are kept. A mask that is a broadcast or a sum of smaller tensors can be kept as
those (see `recipes.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ..codecs.base import Kept
from ..codecs.channel import HeadCodec
from ..codecs.chunked import CPU_CHUNK, DEVICE_CHUNK
from ..pieces import piece_bounds
from .attention_gradient import (
    attention_gradients,
    formula_dtype,
    gradients_by_heads,
    items_by_formula,
    prefers_formula,
)
from .lineage import Program, Span
from .memory_order import empty_in_order, memory_permutation
from .recipes import Recipe, flatten_recipe, rebuild
from .rng import replayed_rng, rng_state


def _items_per_piece(query: tuple[int, ...], key: tuple[int, ...], device: torch.device) -> int:
    """Batch items whose q, k, v and (H, L, S) scores are decoded at a time."""
    per_item = query[1] * (query[2] * query[3] + 2 * key[2] * key[3])
    size = 4 * CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK
    return max(1, size // max(per_item, 1))


@dataclass(frozen=True)
class Heads:
    """How q, k and v are kept: those with a place in the program are made again, the others in codes.

    Args:
        codecs: of q, k and v, for those in codes.
        program, leaves: make the others (`compile_program`); none where all are in codes.
        rebuilt: for each of q, k and v, whether the program makes it; its results come in this order.
    """

    codecs: tuple[HeadCodec, ...]
    program: Program | None = None
    leaves: tuple[Tensor, ...] = ()
    rebuilt: tuple[bool, bool, bool] = (False, False, False)

    def items_per_step(self, items: int, step: int) -> int:
        """At most `step` rows of the first dimension, as many as the program can make alone; all, if it can't."""
        if self.program is None:
            return max(1, min(step, items))
        places = self.program.items
        factor = None if places[0] is None else places[0].factor
        if self.program.count is None or any(p is None or p.dim != 0 or p.factor != factor for p in places):
            return items
        return max(1, step // factor) * factor  # type: ignore[operator]

    def encode(self, heads: Sequence[Tensor]) -> list[Kept]:
        """Codes of those that are not made again."""
        parts = zip(heads, self.codecs, self.rebuilt, strict=True)
        return [codec.encode(t) for t, codec, again in parts if not again]

    def decode(
        self,
        codes: Sequence[Kept],
        leaves: Sequence[Tensor],
        shapes: Sequence[tuple[int, int, int, int]],
        dtype: torch.dtype,
        rows: Span,
    ) -> list[Tensor]:
        """q, k and v again, rows `[start, stop)` of the first dimension."""
        start, stop = rows
        made: Iterator[Tensor] = iter(())
        if self.program is not None:
            whole = (start, stop) == (0, shapes[0][0])
            factor = 1 if self.program.items[0] is None else self.program.items[0].factor
            made = iter(self.program.run(leaves, None if whole else (start // factor, stop // factor)))
        coded = iter(codes)
        found = []
        for shape, codec, again in zip(shapes, self.codecs, self.rebuilt, strict=True):
            if again:
                found.append(next(made).to(dtype))
            else:
                kept = tuple(t[start:stop] for t in next(coded))
                found.append(codec.decode(kept, (stop - start, *shape[1:]), dtype))
        return found


def _of_items(mask: Tensor | None, start: int, stop: int) -> Tensor | None:
    """The mask of some items of the batch."""
    return mask if mask is None or mask.dim() < 4 or mask.shape[0] == 1 else mask[start:stop]


class AttentionFunction(torch.autograd.Function):
    """`softmax(q k^T scale + mask) v` on `(N, H, L, D)`; keeps what `heads` makes of q, k and v."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        mask_recipe: Recipe | None,
        options: dict[str, Any],
        heads: Heads,
    ) -> Tensor:
        ctx.shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
        ctx.dtypes = query.dtype, key.dtype, value.dtype
        ctx.options = options
        ctx.orders = tuple(memory_permutation(t) for t in (query, key, value))
        ctx.device = query.device
        state = rng_state(query.device) if options["dropout_p"] > 0 else None
        output = sdpa(query, key, value, attn_mask=mask, **options)
        ctx.compute_dtype = output.dtype
        kept = heads.encode((query, key, value))
        ctx.lengths = [len(k) for k in kept]
        ctx.num_leaves = len(heads.leaves)
        ctx.has_mask = mask is not None
        if mask_recipe is None:
            mask_leaves, ctx.mask_tree = ([mask] if mask is not None else []), None
        else:
            mask_leaves, ctx.mask_tree = flatten_recipe(mask_recipe)
        ctx.save_for_backward(state, *(t for k in kept for t in k), *heads.leaves, *mask_leaves)
        ctx.heads = replace(heads, leaves=())
        coded = [codec for codec, again in zip(heads.codecs, heads.rebuilt, strict=True) if not again]
        ctx.codec = coded[0] if coded else None  # for reports of what is kept
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        state, *rest = ctx.saved_tensors
        kept: list[Kept] = []
        for length in ctx.lengths:
            kept.append(tuple(rest[:length]))
            rest = rest[length:]
        leaves, rest = rest[: ctx.num_leaves], rest[ctx.num_leaves :]
        mask: Tensor | None = None
        if ctx.has_mask:
            mask = rest[0] if ctx.mask_tree is None else rebuild(ctx.mask_tree, rest)
        if torch.compiler.is_compiling():
            q, k, v = ctx.heads.decode(kept, leaves, ctx.shapes, ctx.compute_dtype, (0, ctx.shapes[0][0]))
            found = attention_gradients(q, k, v, mask, ctx.options, grad_output.to(ctx.compute_dtype))
            grads = [g.to(d) if n else None for g, d, n in zip(found, ctx.dtypes, ctx.needs_input_grad, strict=False)]
            return *grads, None, None, None, None
        return *_recomputed_backward(ctx, kept, leaves, mask, state, grad_output), None, None, None


def _recomputed_backward(
    ctx: Any,
    kept: list[Kept],
    leaves: list[Tensor],
    mask: Tensor | None,
    state: Tensor | None,
    grad_output: Tensor,
) -> list[Tensor | None]:
    """Gradients of q, k, v and the mask, piece by piece, from the decoded tensors.

    By formula where that is faster, else from torch's own attention, which runs again.
    """
    needs = ctx.needs_input_grad[:4]
    items = ctx.shapes[0][0]
    grads: list[Tensor | None] = [
        empty_in_order(shape, order, own, ctx.device) if need else None
        for shape, order, own, need in zip(ctx.shapes, ctx.orders, ctx.dtypes, needs, strict=False)
    ]
    grad_mask: Tensor | None = None
    by_formula = not needs[3] and prefers_formula(ctx.shapes[0], ctx.shapes[1], ctx.device, ctx.options)
    dtype = ctx.compute_dtype
    if by_formula:
        dtype = formula_dtype(dtype, ctx.device)
        step = items_by_formula(ctx.shapes[0], ctx.shapes[1])
    elif state is not None or needs[3]:  # random numbers, and a gradient of the mask, belong to the whole batch
        step = items
    else:
        step = _items_per_piece(ctx.shapes[0], ctx.shapes[1], ctx.device)
    step = ctx.heads.items_per_step(items, step)
    for start, stop in piece_bounds(items, step):
        inputs = ctx.heads.decode(kept, leaves, ctx.shapes, dtype, (start, stop))
        if by_formula:
            q, k, v = inputs
            grad = grad_output[start:stop].to(dtype)
            targets = [None if target is None else target[start:stop] for target in grads]
            gradients_by_heads(q, k, v, _of_items(mask, start, stop), ctx.options, grad, targets)
            continue
        inputs = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=False)]
        piece_mask = _of_items(mask, start, stop)
        if mask is not None and needs[3]:
            piece_mask = mask.detach().requires_grad_()
            inputs.append(piece_mask)
        with torch.enable_grad(), replayed_rng(state, ctx.device):
            output = sdpa(inputs[0], inputs[1], inputs[2], attn_mask=piece_mask, **ctx.options)
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, grad_output[start:stop].to(output.dtype)))
        for target in grads:
            if target is not None:
                target[start:stop] = next(found)
        if needs[3]:
            grad_mask = next(found)
    return [*grads, grad_mask]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    codec: HeadCodec | None,
    mask_recipe: Recipe | None = None,
    heads: Heads | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` on `(N, H, L, D)` tensors.

    Args:
        options: `dropout_p`, `is_causal`, `scale`, `enable_gqa` of the torch function.
        codec: for q, k and v alike, where `heads` says nothing else.
        mask_recipe: how to make the mask again in backward; it is then not kept.
        heads: how each of q, k and v is kept; None: through `codec`.

    Raises:
        ValueError: if neither codec nor heads are given.
    """
    if heads is None:
        if codec is None:
            raise ValueError("attention needs a codec, or heads that have theirs.")
        heads = Heads((codec,) * 3)
    return AttentionFunction.apply(query, key, value, mask, mask_recipe, options, heads)
