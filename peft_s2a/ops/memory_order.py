"""Flat views in the order in which a tensor lies in memory, so that channels-last maps are not copied."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Permutation = tuple[int, ...]


def memory_permutation(x: Tensor) -> Permutation:
    """Dimensions from the slowest to the fastest in memory."""
    if x.is_contiguous():
        return tuple(range(x.dim()))
    strides = x.stride()
    return tuple(sorted(range(x.dim()), key=lambda d: (-strides[d], d)))


def is_dense(x: Tensor) -> bool:
    """Whether the elements lie in memory without overlap and without gaps, in whatever order of dimensions."""
    return x.permute(memory_permutation(x)).is_contiguous()


def flatten(x: Tensor, permutation: Permutation) -> Tensor:
    """`(numel,)`; a view where x is dense in this order, else a copy."""
    return x.permute(permutation).reshape(-1)


def unflatten(flat: Tensor, shape: Sequence[int], permutation: Permutation) -> Tensor:
    """Inverse of `flatten`: a view of `flat` with the given shape."""
    in_order = flat.view([shape[d] for d in permutation])
    inverse = sorted(range(len(permutation)), key=permutation.__getitem__)
    return in_order if list(permutation) == inverse == sorted(inverse) else in_order.permute(inverse)


def empty_in_order(shape: Sequence[int], permutation: Permutation, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor whose dimensions lie in memory in this order."""
    flat = torch.empty(math.prod(shape), dtype=dtype, device=device)
    return unflatten(flat, shape, permutation)


def channels_last(x: Tensor) -> torch.memory_format | None:
    """The channels-last format of a map or volume that has it."""
    if x.dim() < 4 or x.is_contiguous():
        return None
    dense = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return dense if x.is_contiguous(memory_format=dense) else None


def shape_only(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor that stands for its shape: one element, expanded."""
    return like.new_empty(1).expand(tuple(shape))


def storage_address(x: Tensor) -> int:
    """Where torch's record of the memory of `x` is.

    Not by way of `untyped_storage()`: what that gives holds the memory, too, for as long as the memory lives, and
    autograd then no longer adds gradients up in place.
    """
    return int(torch._C._storage_address(x))  # type: ignore[attr-defined]


def shares_memory(x: Tensor, y: Tensor) -> bool:
    """Whether one is a view of the other, or of the same memory."""
    return storage_address(x) == storage_address(y)


def same_memory(x: Tensor) -> Tensor:
    """A new tensor over the memory of `x`, which autograd does not know for a view of it.

    Every tensor that autograd had kept of the old content becomes an error in backward, as after any in-place change.
    """
    fresh = torch.empty(0, dtype=x.dtype, device=x.device)
    fresh.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())
    torch.autograd.graph.increment_version(x)
    return fresh


def no_view(x: Tensor) -> Tensor:
    """`x`, the fresh result of a function, as a tensor that may be changed in place behind an autograd function.

    Some of torch's functions give a view of what they made (a product of more than two dimensions on a CPU), and
    autograd lets nobody write into a view that an autograd function gave out.
    """
    if torch.compiler.is_compiling() or x._base is None or is_traceable_wrapper_subclass(x):
        return x
    return same_memory(x)
