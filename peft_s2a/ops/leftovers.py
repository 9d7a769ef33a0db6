"""What torch's own operators save, for functions without an operator here: codes in place of large tensors.

A function's rule (`table/saved.py`) names the codecs of what its backward reads. Where that is a sign, a shape or a
mask, a stand-in gives torch's gradient exactly; where it multiplies with the tensor, group-wise codes pass their error
on as it is; where it divides, codes of bounded relative error do. What has no rule is kept as it is, and
`coverage_report` says so.

The codecs act through saved-tensor hooks. Hooks of others that were there before (offloading, checkpointing) still see
what is kept: the packed codes and scales are handed on to them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..codecs.base import Codec
from ..codecs.chunked import decode_range, encode_chunked
from .memory_order import flatten, memory_permutation, unflatten

MIN_ELEMENTS = 1 << 14
"""Smaller tensors are kept as they are (64 KB of float32)."""

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def _current_hooks() -> Hooks | None:
    hooks: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks


@dataclass(frozen=True)
class SavedCodecs:
    """Codecs of what one call of a torch function saves; None keeps a tensor as it is.

    Attributes:
        arguments: of floating tensors that share memory with an argument. Arguments without a gradient are constants,
            which others hold too: they are kept as they are.
        others: of other floating tensors, such as the result.
        indices: of int64 tensors.
        masks: of bool tensors.
    """

    arguments: Codec | None = None
    others: Codec | None = None
    indices: Codec | None = None
    masks: Codec | None = None


@dataclass(frozen=True)
class _Call:
    """The codecs of a call; storages of its arguments, with a gradient and without; shapes of its parameters."""

    codecs: SavedCodecs
    arguments: frozenset[int]
    constants: frozenset[int]
    parameters: frozenset[torch.Size]

    def codec_of(self, tensor: Tensor) -> Codec | None:
        if tensor.dtype == torch.bool:
            return self.codecs.masks
        if tensor.dtype == torch.int64:
            return self.codecs.indices
        if not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return None
        storage = tensor.untyped_storage()._cdata
        if storage in self.constants or tensor.shape in self.parameters:  # autocast saves casts of parameters
            return None
        return self.codecs.arguments if storage in self.arguments else self.codecs.others


def _storages(tensors: Iterable[Tensor]) -> frozenset[int]:
    return frozenset(t.untyped_storage()._cdata for t in tensors)


@dataclass(frozen=True)
class CodedTensor:
    """A saved tensor in codes: handles of what is kept, and what it takes to decode it."""

    handles: tuple[Any, ...]
    codec: Codec
    shape: torch.Size
    dtype: torch.dtype
    permutation: tuple[int, ...]


class _State(threading.local):
    """What one thread has entered and coded."""

    def __init__(self) -> None:
        self.call: _Call | None = None
        self.entered: list[tuple[torch.autograd.graph.saved_tensors_hooks, Hooks | None]] = []
        self.coded: dict[tuple[Any, ...], tuple[StorageWeakRef, CodedTensor]] = {}


class LeftoverHooks:
    """Pack and unpack hooks; `enter` and `leave` nest."""

    def __init__(self) -> None:
        self._state = _State()

    def __reduce__(self) -> tuple[type[LeftoverHooks], tuple[()]]:
        return LeftoverHooks, ()

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
    def coding(self, codecs: SavedCodecs, tensors: Iterable[Tensor]) -> Iterator[None]:
        """What a function saves inside goes through the codecs; `tensors` are its arguments."""
        tensors = tuple(tensors)
        arguments = _storages(t for t in tensors if t.requires_grad)
        constants = _storages(t for t in tensors if not t.requires_grad)
        parameters = frozenset(t.shape for t in tensors if isinstance(t, nn.Parameter))
        was, self._state.call = self._state.call, _Call(codecs, arguments, constants - arguments, parameters)
        try:
            yield
        finally:
            self._state.call = was

    def codec_of(self, tensor: Tensor) -> Codec | None:
        """The codec of a saved tensor: of a large one that is no parameter, in a call that has codecs."""
        if self._state.call is None or tensor.numel() < MIN_ELEMENTS:
            return None
        base = tensor if tensor._base is None else tensor._base
        return None if isinstance(base, nn.Parameter) else self._state.call.codec_of(tensor)

    def encode(self, tensor: Tensor, codec: Codec, outer: Hooks | None) -> CodedTensor:
        """Codes of the tensor; the same ones for a tensor that is saved twice in a pass."""
        storage = tensor.untyped_storage()
        view = storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version
        place = (*view, codec, id(outer))
        known = self._state.coded.get(place)
        if known is not None and not known[0].expired():
            return known[1]
        permutation = memory_permutation(tensor)
        flat = flatten(tensor, permutation)
        kept = encode_chunked(codec, flat.numel(), flat.device, lambda start, stop: flat[start:stop])
        handles = kept if outer is None else tuple(outer[0](t) for t in kept)
        coded = CodedTensor(handles, codec, tensor.shape, tensor.dtype, permutation)
        self._state.coded[place] = StorageWeakRef(storage), coded
        return coded


@dataclass(frozen=True)
class _Pair:
    """The hooks of one `enter`, over the hooks that were there before."""

    owner: LeftoverHooks
    outer: Hooks | None

    def pack(self, tensor: Tensor) -> Any:
        codec = self.owner.codec_of(tensor)
        if codec is not None:
            return self.owner.encode(tensor, codec, self.outer)
        return tensor if self.outer is None else self.outer[0](tensor)

    def unpack(self, handle: Any) -> Tensor:
        if not isinstance(handle, CodedTensor):
            return handle if self.outer is None else self.outer[1](handle)
        kept = handle.handles if self.outer is None else tuple(self.outer[1](h) for h in handle.handles)
        flat = decode_range(handle.codec, kept, 0, handle.shape.numel(), handle.dtype)
        return unflatten(flat, handle.shape, handle.permutation)
