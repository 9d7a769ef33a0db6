"""Follows storages from the operator that makes them to their end."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..pieces import Bounds, ShortensLoops
from .kernels import kernel_flops, kernel_peak


@dataclass(eq=False)
class Storage:
    """One storage: its size, what made it, and the numbers of the events of its birth and death."""

    bytes: int
    operator: str
    module: str
    phase: str
    born: int
    died: int | None = None


@dataclass(eq=False)
class StorageTracker(ShortensLoops):
    """Follows every storage that operators make while it is entered.

    Attributes:
        events: storages in the order in which they were made and freed, with +1 or -1.
        flops: FLOPs so far.
    """

    module_path: Callable[[], str]
    phase: str = "forward"
    flops: int = 0
    events: list[tuple[Storage, int]] = field(default_factory=list)
    _known: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def ignore(self, tensors: list[Tensor]) -> None:
        """Leaves out storages that were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            self._known[key] = weakref.ref(storage, lambda _, key=key: self._known.pop(key, None))  # type: ignore[misc]

    def storage_of(self, tensor: Tensor) -> Storage | None:
        """The storage under a tensor, if it was made in here."""
        entry = self._known.get(tensor.untyped_storage()._cdata)
        return entry[1] if isinstance(entry, tuple) else None

    def _record(self, operator: str, size: int) -> Storage:
        storage = Storage(size, operator, self.module_path(), self.phase, len(self.events))
        self.events.append((storage, 1))
        return storage

    def _free(self, storage: Storage) -> None:
        storage.died = len(self.events)
        self.events.append((storage, -1))

    def _follow(self, tensor: Tensor, operator: str) -> None:
        memory = tensor.untyped_storage()
        key = memory._cdata
        if key in self._known:
            return
        storage = self._record(operator, memory.nbytes())

        def gone(_: Any) -> None:
            del self._known[key]
            self._free(storage)

        self._known[key] = weakref.ref(memory, gone), storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # asked often, and answered without a dispatch
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        leaves = [out] if isinstance(out, Tensor) else out if isinstance(out, (tuple, list)) else ()
        made = [tensor for tensor in leaves if isinstance(tensor, FakeTensor)]  # a table of constants may be real
        if not made:
            return out
        self.flops += kernel_flops(func, args, kwargs or {}, out)
        inside = kernel_peak(func, args, out) - sum(t.untyped_storage().nbytes() for t in made)
        name = func._schema.name
        if inside > 0:
            scratch = self._record(f"{name} (inside)", inside)
        for tensor in made:
            self._follow(tensor, name)
        if inside > 0:
            self._free(scratch)
        return out

    def shortened(self, total: int, step: int) -> Bounds:
        """All pieces but the last as one; what that makes and frees again counts as one piece of it."""
        many = -(-total // step) - 1
        if many < 1:
            yield from [(0, total)] if total else []
            return
        first = len(self.events)
        yield 0, many * step
        last = len(self.events)
        yield many * step, total
        for storage, sign in self.events[first:last]:
            if sign > 0 and storage.died is not None:  # what the loop's variables held is overwritten by the last piece
                storage.bytes //= many

    def live_bytes(self) -> list[int]:
        """Live bytes after each event."""
        return list(accumulate(sign * storage.bytes for storage, sign in self.events))
