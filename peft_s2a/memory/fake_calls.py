"""Calls on fake tensors that were made before: the result has the same shape, and need not be worked out again.

A model is many times the same block, and codes are made in many small steps, so nearly all calls of a simulated step
repeat an earlier one. What torch remembers itself (`FakeTensorMode.cache_enabled`) is for all processes' life and costs
as much as most of the calls.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_CHANGES_METADATA = (torch.Tag.inplace_view, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


@dataclass(frozen=True)
class _Layout:
    """Of a tensor: all that its operators look at."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Result:
    """How a result is made.

    Attributes:
        layout: its own.
        argument: the argument that shares its storage; None: it has a storage of its own.
        same: it is that argument itself.
    """

    layout: _Layout
    argument: int | None = None
    same: bool = False


class FakeCalls:
    """Runs operators on fake tensors, each combination of layouts and constants once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[_Result, ...] | None] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`func(*args, **kwargs)`."""
        key = _key(func, args, kwargs)
        known = self._known.get(key) if key is not None else None
        if known is not None:
            made = [_make(result, args) for result in known]
            return made[0] if len(func._schema.returns) == 1 else tuple(made)
        before = [_storage(arg) for arg in args]
        out = func(*args, **kwargs)
        if key is not None and key not in self._known:
            self._known[key] = _results(func, args, before, out)
        return out


class _Unseen(Exception):
    """An argument has numbers that may decide the result."""


def _key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
    """What decides the result's layout; None where more than layouts might."""
    if any(tag in func.tags for tag in _CHANGES_METADATA) or any(isinstance(v, Tensor) for v in kwargs.values()):
        return None  # a tensor by keyword is one to write the result to
    try:
        key = func, *map(_part, args), *((name, _part(value)) for name, value in kwargs.items())
        hash(key)
    except (_Unseen, TypeError):  # the latter for what cannot be hashed
        return None
    return key


def _part(value: Any) -> Hashable:
    """An argument's part of the key.

    Raises:
        _Unseen: for one that stands for more than its layout.
    """
    if isinstance(value, FakeTensor):
        if value.constant is not None:
            raise _Unseen
        return tuple(value.shape), value.stride(), value.storage_offset(), value.dtype, value.fake_device
    if isinstance(value, Tensor):
        raise _Unseen
    if isinstance(value, (list, tuple)):
        return tuple(map(_part, value))
    return type(value), value


def _storage(value: Any) -> tuple[int, int] | None:
    if not isinstance(value, FakeTensor):
        return None
    storage = value.untyped_storage()
    return storage._cdata, storage.nbytes()


def _results(
    func: Any, args: tuple[Any, ...], before: list[tuple[int, int] | None], out: Any
) -> tuple[_Result, ...] | None:
    """How the results can be made again; None where that is not certain."""
    if [_storage(arg) for arg in args] != before:
        return None  # an argument has another storage now
    outputs = (out,) if len(func._schema.returns) == 1 else tuple(out) if isinstance(out, tuple) else ()
    if not outputs or not all(type(o) is FakeTensor and o.constant is None for o in outputs):
        return None
    found = []
    for output in outputs:
        layout = _Layout(
            tuple(output.shape), output.stride(), output.storage_offset(), output.dtype, output.fake_device
        )
        places = [i for i, storage in enumerate(before) if storage and storage[0] == output.untyped_storage()._cdata]
        if places:
            found.append(_Result(layout, places[0], output is args[places[0]]))
        elif output.untyped_storage().nbytes() == _bytes(layout):
            found.append(_Result(layout))
        else:
            return None
    return tuple(found)


def _bytes(layout: _Layout) -> int:
    """Of a storage that holds this tensor and nothing else."""
    if 0 in layout.shape:
        return 0
    last = sum((n - 1) * step for n, step in zip(layout.shape, layout.stride, strict=True))
    return (layout.offset + last + 1) * layout.dtype.itemsize


def _make(result: _Result, args: tuple[Any, ...]) -> Tensor:
    if result.same:
        same: Tensor = args[result.argument or 0]
        return same
    layout = result.layout
    mode: FakeTensorMode | None = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    assert mode is not None
    if result.argument is None:
        with torch._C._DisableTorchDispatch():
            made = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device="meta")
    else:
        storage = args[result.argument].untyped_storage()
        with in_kernel_invocation_manager(mode):
            made = torch.empty(0, dtype=layout.dtype, device="meta")
            made.set_(storage, layout.offset, layout.shape, layout.stride)
    return FakeTensor(mode, made, layout.device)
