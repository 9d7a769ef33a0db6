"""What operators outside the table save: large tensors go through a group-wise codec where backward bears it.

A backward that multiplies with what was saved passes the code's error on as it is. One that divides by it or compares
with it can turn the smallest error into a wrong gradient (`sqrt`, `log`, `amax`): what such functions save is kept as
it is, and `coverage_report` says so.

The codec acts through saved-tensor hooks. Hooks of others that were there before (offloading, checkpointing) still see
what is kept: the packed codes and scales are handed on to them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..codecs.affine import GroupAffineCodec
from ..codecs.chunked import decode_range, encode_chunked
from .memory_order import flatten, memory_permutation, unflatten

MIN_ELEMENTS = 1 << 14
"""Smaller tensors are kept as they are (64 KB of float32)."""

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def _current_hooks() -> Hooks | None:
    hooks: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks


@dataclass(frozen=True)
class CodedTensor:
    """A saved tensor in codes: handles of what is kept, and what it takes to decode it."""

    handles: tuple[Any, ...]
    codec: GroupAffineCodec
    shape: torch.Size
    dtype: torch.dtype
    permutation: tuple[int, ...]


class _State(threading.local):
    """What one thread has entered and coded."""

    def __init__(self) -> None:
        self.active = False
        self.entered: list[tuple[torch.autograd.graph.saved_tensors_hooks, Hooks | None]] = []
        self.coded: dict[tuple[Any, ...], tuple[StorageWeakRef, CodedTensor]] = {}


class LeftoverHooks:
    """Pack and unpack hooks; `enter` and `leave` nest.

    Args:
        num_bits: bits per element, to which 32 / 64 bits for scales come.
    """

    def __init__(self, num_bits: int) -> None:
        self.codec = GroupAffineCodec(num_bits)
        self._state = _State()

    def __reduce__(self) -> tuple[type[LeftoverHooks], tuple[int]]:
        return LeftoverHooks, (self.codec.num_bits,)

    def enter(self) -> bool:
        """Puts the hooks on top of those of others; returns False if they are on top already."""
        outer = _current_hooks()
        if self._state.entered and outer == self._state.entered[-1][1]:
            return False
        pair = _Pair(self, outer)
        hooks = torch.autograd.graph.saved_tensors_hooks(pair.pack, pair.unpack)
        hooks.__enter__()
        self._state.entered.append((hooks, _current_hooks()))
        return True

    def leave(self) -> None:
        """Takes the hooks of the last `enter` off."""
        hooks, _ = self._state.entered.pop()
        hooks.__exit__(None, None, None)
        if not self._state.entered:
            self._state.coded.clear()

    @contextmanager
    def coding(self) -> Iterator[None]:
        """What is saved inside goes through the codec."""
        was, self._state.active = self._state.active, True
        try:
            yield
        finally:
            self._state.active = was

    def encode(self, tensor: Tensor, outer: Hooks | None) -> CodedTensor:
        """Codes of the tensor; the same ones for a tensor that is saved twice in a pass."""
        storage = tensor.untyped_storage()
        place = (storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version, id(outer))
        known = self._state.coded.get(place)
        if known is not None and not known[0].expired():
            return known[1]
        permutation = memory_permutation(tensor)
        flat = flatten(tensor, permutation)
        kept = encode_chunked(self.codec, flat.numel(), flat.device, lambda start, stop: flat[start:stop])
        handles = kept if outer is None else tuple(outer[0](t) for t in kept)
        coded = CodedTensor(handles, self.codec, tensor.shape, tensor.dtype, permutation)
        self._state.coded[place] = StorageWeakRef(storage), coded
        return coded

    def applies(self, tensor: Tensor) -> bool:
        """Whether a saved tensor is a large activation, not a parameter or a view of one."""
        if not self._state.active or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return False
        base = tensor if tensor._base is None else tensor._base
        return tensor.numel() >= MIN_ELEMENTS and not isinstance(base, nn.Parameter)


@dataclass(frozen=True)
class _Pair:
    """The hooks of one `enter`, over the hooks that were there before."""

    owner: LeftoverHooks
    outer: Hooks | None

    def pack(self, tensor: Tensor) -> Any:
        if self.owner.applies(tensor):
            return self.owner.encode(tensor, self.outer)
        return tensor if self.outer is None else self.outer[0](tensor)

    def unpack(self, handle: Any) -> Tensor:
        if not isinstance(handle, CodedTensor):
            return handle if self.outer is None else self.outer[1](handle)
        kept = handle.handles if self.outer is None else tuple(self.outer[1](h) for h in handle.handles)
        flat = decode_range(handle.codec, kept, 0, handle.shape.numel(), handle.dtype)
        return unflatten(flat, handle.shape, handle.permutation)
