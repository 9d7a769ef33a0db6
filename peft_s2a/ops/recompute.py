"""Blocks that keep their input alone, in codes, and run again in backward.

Unlike `torch.utils.checkpoint`, the input is kept in a few bits, and the first run is one without gradients: nothing is
encoded that is thrown away. Gradients of parameters come back as gradients of the function's own inputs, so hooks that
wait for them (distributed training) fire once, when they are complete.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..codecs.affine import GroupAffineCodec
from ..codecs.base import Codec, IdentityCodec
from ..codecs.chunked import decode_range, encode_chunked
from ..codecs.rounding import Rounding
from .memory_order import flatten, memory_permutation, unflatten
from .rng import replayed_rng, rng_state
from .short_product import products_again


@dataclass(frozen=True)
class Call:
    """What a block is called with, without the tensors: leaves of a tree, `None` where a tensor belongs."""

    run: Callable[..., Any]
    block: nn.Module
    leaves: tuple[Any, ...]
    spec: TreeSpec

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        given = iter(tensors)
        args, kwargs = tree_unflatten([next(given) if t is _TENSOR else t for t in self.leaves], self.spec)
        return self.run(*args, **kwargs)


_TENSOR = object()


class RecomputeFunction(torch.autograd.Function):
    """`call(tensors)`; keeps the first large tensor through `codec`, the others as they are."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, codec: Codec, coded: int, num_tensors: int, outputs: list[Any], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        tensors = inputs[:num_tensors]
        device = tensors[coded].device
        ctx.call, ctx.codec, ctx.coded = call, codec, coded
        ctx.parameters = inputs[num_tensors:]
        ctx.device, ctx.autocast = device, _autocast_state(device)
        before = rng_state(device)
        found, spec = tree_flatten(call(tensors))
        state = None if _equal(before, rng_state(device)) else before  # nothing random in it
        results = [t for t in found if isinstance(t, Tensor)]
        outputs.extend((spec, [_TENSOR if isinstance(t, Tensor) else t for t in found]))
        ctx.mark_non_differentiable(*(t for t in results if not t.is_floating_point()))
        x = tensors[coded]
        ctx.shape, ctx.dtype, ctx.permutation = x.shape, x.dtype, memory_permutation(x)
        flat = flatten(x, ctx.permutation)
        kept = encode_chunked(codec, flat.numel(), flat.device, lambda start, stop: flat[start:stop])
        ctx.num_kept = len(kept)
        ctx.save_for_backward(state, *kept, *tensors[:coded], *tensors[coded + 1 :])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        state, *saved = ctx.saved_tensors
        kept, others = tuple(saved[: ctx.num_kept]), saved[ctx.num_kept :]
        flat = decode_range(ctx.codec, kept, 0, ctx.shape.numel(), ctx.dtype)
        tensors = [*others[: ctx.coded], unflatten(flat, ctx.shape, ctx.permutation), *others[ctx.coded :]]
        needs = ctx.needs_input_grad[5:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=False)]
        del saved, kept, others, flat, tensors
        with (
            torch.enable_grad(),
            torch.autocast(ctx.device.type, **ctx.autocast),
            replayed_rng(state, ctx.device),
            _running_again(),
            products_again(not isinstance(ctx.codec, IdentityCodec)),
            _unchanged_statistics(ctx.call.block),
        ):
            results = [t for t in tree_flatten(ctx.call(inputs))[0] if isinstance(t, Tensor)]
            ends = [(r, g) for r, g in zip(results, grads, strict=True) if r.requires_grad and g is not None]
            wanted = [t for t in (*inputs, *ctx.parameters) if t.requires_grad]
            roots, root_grads = [r for r, _ in ends], [g for _, g in ends]
            del results, ends
            found = iter(torch.autograd.grad(roots, wanted, root_grads, allow_unused=True))
        given = (next(found) if t.requires_grad else None for t in (*inputs, *ctx.parameters))
        return None, None, None, None, None, *given


class _State(threading.local):
    again = False


_STATE = _State()


@contextmanager
def _running_again() -> Iterator[None]:
    before, _STATE.again = _STATE.again, True
    try:
        yield
    finally:
        _STATE.again = before


def runs_again() -> bool:
    """Whether this thread is inside a block's second run."""
    return _STATE.again


def _autocast_state(device: torch.device) -> dict[str, Any]:
    if not torch.amp.is_autocast_available(device.type):
        return {"enabled": False}
    return {
        "enabled": torch.is_autocast_enabled(device.type),
        "dtype": torch.get_autocast_dtype(device.type),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether the numbers are the same; fake tensors have none, and count as unchanged."""
    if isinstance(one, FakeTensor) or isinstance(other, FakeTensor):
        return True
    with unset_fake_temporarily():
        return torch.equal(one, other)


@contextmanager
def _unchanged_statistics(block: nn.Module) -> Iterator[None]:
    """Running statistics move once in a step: the second run does not move them again."""
    moving = any(isinstance(m, _BatchNorm) and m.training and m.track_running_stats for m in block.modules())
    before = [(buffer, buffer.clone()) for buffer in block.buffers()] if moving else []
    try:
        yield
    finally:
        for buffer, content in before:
            if not _equal(buffer, content):
                buffer.copy_(content)


def recompute(
    run: Callable[..., Any],
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    input: Tensor,
    num_bits: int | None,
    rounding: Rounding = "nearest",
) -> Any:
    """`run(*args, **kwargs)`, and once more in backward.

    Args:
        run: the block's forward; in backward it is called with gradients enabled.
        block: the module whose parameters get gradients.
        input: the tensor among the arguments that is kept in `num_bits` (8: groups of 128 elements, else 64); other
            tensors are kept as they are.
        rounding: of these codes.
    """
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    coded = next(i for i, t in enumerate(tensors) if t is input)
    call = Call(run, block, tuple(_TENSOR if isinstance(t, Tensor) else t for t in leaves), spec)
    codec: Codec = IdentityCodec()
    if num_bits is not None and input.is_floating_point() and input.dtype != torch.float64:
        codec = GroupAffineCodec(num_bits, 128 if num_bits == 8 else 64, rounding)
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    outputs: list[Any] = []
    results = iter(RecomputeFunction.apply(call, codec, coded, len(tensors), outputs, *tensors, *parameters))
    out_spec, found = outputs
    return tree_unflatten([next(results) if t is _TENSOR else t for t in found], out_spec)
