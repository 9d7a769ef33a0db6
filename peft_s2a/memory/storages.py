"""Follows storages from the operator that makes them to their end.

Work that is done in pieces is followed once, on all of it, and counted as what it is: see `Section` and `shortened`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from ..pieces import Bounds, ShortensLoops
from .fake_calls import FakeCalls
from .kernels import kernel_flops, kernel_peak

Change = tuple["Storage", int]
"""Bytes of a storage that become live, or (negative) are freed."""


@dataclass(eq=False)
class Storage:
    """One storage: its size, what made it, and the numbers of the events of its birth and death.

    Attributes:
        of_weights: whether it was made of weights alone, so that its size does not depend on the batch.
        parts: it is a temporary of a loop over this many parts, each of which has one of its own.
        at_once: it is made in full with the first of some pieces.
    """

    bytes: int
    operator: str
    module: str
    phase: str
    born: int
    died: int | None = None
    of_weights: bool = False
    parts: int = 1
    at_once: bool = False


@dataclass(eq=False)
class Section:
    """Events `[first, last)` of work that was done at once and stands for pieces: how many, as a fraction.

    Where the pieces are alike, what is live grows or shrinks by the same with each, so the most is live during the
    first or during the last: these two are counted.
    """

    pieces: Fraction
    first: int
    last: int = -1

    def changes(self, events: list[tuple[Storage, int]]) -> list[Change]:
        """What the pieces make and free, one after another."""
        inside, pieces = events[self.first : self.last], float(self.pieces)
        first, between, last = [], [], []
        for storage, sign in inside:
            ends_here = storage.died is not None and storage.died < self.last
            temporary = storage.born >= self.first and ends_here
            full = storage.of_weights or storage.at_once
            if temporary:
                share = 1.0 if full else 1 / max(storage.parts, pieces)
                sizes = int(storage.bytes * share), 0, int(storage.bytes * share)
            else:
                share, rest = (1.0, 0.0) if full else (1 / pieces, min(1.0, pieces - 1) / pieces)
                piece, remainder = int(storage.bytes * share), int(storage.bytes * rest)
                sizes = piece, storage.bytes - piece - remainder, remainder
            first.append((storage, sign * sizes[0]))
            last.append((storage, sign * sizes[2]))
            if not temporary:
                between.append((sign, storage, sign * sizes[1]))
        between.sort(key=lambda change: change[0])  # what is freed comes first
        return [*first, *((storage, size) for _, storage, size in between), *last]


@dataclass(eq=False)
class StorageTracker(ShortensLoops):
    """Follows every storage that operators make while it is entered.

    Attributes:
        events: storages in the order in which they were made and freed, with +1 or -1.
        sections: what of them stands for pieces.
        flops: FLOPs so far.
    """

    module_path: Callable[[], str]
    phase: str = "forward"
    flops: int = 0
    events: list[tuple[Storage, int]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    _known: dict[int, Any] = field(default_factory=dict)
    _open: Section | None = None
    _calls: FakeCalls = field(default_factory=FakeCalls)

    def __post_init__(self) -> None:
        super().__init__()

    def ignore(self, tensors: list[Tensor], *, weights: bool) -> None:
        """Leaves out storages that were there before: of weights or of the batch."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            reference = weakref.ref(storage, lambda _, key=key: self._known.pop(key, None))  # type: ignore[misc]
            self._known[key] = reference, weights

    def storage_of(self, tensor: Tensor) -> Storage | None:
        """The storage under a tensor, if it was made in here."""
        known = self._known.get(tensor.untyped_storage()._cdata, (None, None))[1]
        return known if isinstance(known, Storage) else None

    def _is_of_weights(self, tensor: Tensor) -> bool:
        known = self._known.get(tensor.untyped_storage()._cdata, (None, False))[1]
        return known.of_weights if isinstance(known, Storage) else known

    def _record(self, operator: str, size: int) -> Storage:
        storage = Storage(size, operator, self.module_path(), self.phase, len(self.events))
        self.events.append((storage, 1))
        return storage

    def _free(self, storage: Storage) -> None:
        storage.died = len(self.events)
        self.events.append((storage, -1))

    def _follow(self, tensor: Tensor, operator: str, of_weights: bool) -> None:
        memory = tensor.untyped_storage()
        key = memory._cdata
        if key in self._known:
            return
        storage = self._record(operator, memory.nbytes())
        storage.of_weights = of_weights

        def gone(_: Any) -> None:
            del self._known[key]
            self._free(storage)

        self._known[key] = weakref.ref(memory, gone), storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # asked often, and answered without a dispatch
            return args[0].fake_device
        out = self._calls.run(func, args, kwargs or {})
        leaves = [out] if isinstance(out, Tensor) else out if isinstance(out, (tuple, list)) else ()
        made = [tensor for tensor in leaves if isinstance(tensor, FakeTensor)]  # a table of constants may be real
        if not made:
            return out
        self.flops += kernel_flops(func, args, kwargs or {}, out)
        inside = kernel_peak(func, args, out) - sum(t.untyped_storage().nbytes() for t in made)
        name = func._schema.name
        if inside > 0:
            scratch = self._record(f"{name} (inside)", inside)
        read = [arg for arg in args if isinstance(arg, FakeTensor)]
        of_weights = bool(read) and all(map(self._is_of_weights, read))
        for tensor in made:
            self._follow(tensor, name, of_weights)
        if inside > 0:
            self._free(scratch)
        return out

    def shortened(self, total: int, step: int) -> Bounds:
        """All parts but the last as one; what that makes and frees again counts as one part of it."""
        alone = total <= step * (self._open.pieces if self._open else 1)
        many = -(-total // step) - 1
        if alone or many < 1:
            yield from [(0, total)] if total else []
            return
        first = len(self.events)
        yield 0, many * step
        last = len(self.events)
        yield many * step, total
        for storage, sign in self.events[first:last]:
            if sign > 0 and storage.died is not None:  # what the loop's variables held is overwritten by the last part
                storage.parts = max(storage.parts, many)

    def all_at_once(self, run: Callable[[Tensor], Any], x: Tensor, size: int) -> Any:
        """Runs on all items, in one section of forward and one of backward."""
        if self._open:
            return run(x)  # the piece of a piece
        pieces = Fraction(len(x), size)
        x = _Passage.apply(x, self.close_section)
        self.open_section(pieces)
        result = run(x)
        self.close_section()
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda gradient: self.open_section(pieces))
        return result

    def made_at_once(self, tensor: Tensor) -> None:
        """Counts a storage in full from the first piece on."""
        storage = self.storage_of(tensor)
        if storage is not None:
            storage.at_once = True

    def open_section(self, pieces: Fraction) -> None:
        if self._open and self._open.first == len(self.events):
            return  # another output of the same
        self.close_section()
        self._open = Section(pieces, len(self.events))

    def close_section(self) -> None:
        """Ends the section that is open, if any."""
        if self._open:
            self._open.last = len(self.events)
            self.sections.append(self._open)
            self._open = None

    def changes(self, first: int, last: int) -> list[Change]:
        """Changes of what is live in events `[first, last)`, in order; those of pieces as they would follow."""

        def plain(start: int, stop: int) -> list[Change]:
            return [(storage, sign * (storage.bytes // storage.parts)) for storage, sign in self.events[start:stop]]

        changes = []
        for section in self.sections:
            if first <= section.first and section.last <= last:
                changes += plain(first, section.first) + section.changes(self.events)
                first = section.last
        return changes + plain(first, last)


class _Passage(torch.autograd.Function):
    """Passes a tensor on, and tells when its gradient comes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, passed: Callable[[], None]) -> Tensor:
        ctx.passed = passed
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.passed()
        return grads[0], None
