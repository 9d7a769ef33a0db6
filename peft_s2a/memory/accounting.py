"""Bytes that autograd keeps for backward, counted tensor by tensor.

Counted are the storages reachable from autograd's saved tensors, each once, without those of parameters, of buffers
and of the batch. `peft_s2a.memory.kept_bytes_by_allocator` measures the same from the allocator's side.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks

from .module_path import tracked_module_path
from .running import Batch, call_model, measured_training, tensors_in


@dataclass(frozen=True)
class SavedTensor:
    """One storage that is kept for backward.

    Attributes:
        shape: shape of the first saved tensor that lies in the storage.
        dtype: its dtype.
        device: its device.
        bytes: size of the whole storage in bytes (a saved view keeps all of what it is a view of).
        operator: autograd node that saved it first, e.g. `"GeluBackward0"`; `""` if the node can't be reached
            from the outputs (autograd hides the node of an in-place operator on a view).
        module: path of the innermost module whose forward was running; `""` for the model itself.
        packed: whether saved-tensor hooks inside the model's forward made it (see `saved_tensors`).
        bits: bits per element of the code it is part of; None for a tensor that is kept as it is.
        leftover: whether it is the code of a tensor that an operator of torch saved.
        exact: whether that code gives torch's gradient exactly.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    bytes: int
    operator: str
    module: str
    packed: bool = False
    bits: int | None = None
    leftover: bool = False
    exact: bool = False


def saved_activation_bytes(model: nn.Module, batch: Batch) -> int:
    """Bytes that autograd keeps for the backward of one training forward of `model`.

    Args:
        model: any module; it is run in train mode and then put back (mode, buffers, gradients, random state).
        batch: a mapping for `model(**batch)`, a tuple or list for `model(*batch)`, a tensor for `model(batch)`.

    Returns:
        Bytes, each storage counted once; parameters, buffers and the batch's own tensors (and views of them) are not
        counted. What custom `autograd.Function`s keep through `ctx.save_for_backward` is counted, what they set as
        attributes of `ctx` is not. For tensors packed by hooks inside the model see `saved_tensors`.
    """
    return sum(saved.bytes for saved in saved_tensors(model, batch))


def saved_tensors(model: nn.Module, batch: Batch) -> list[SavedTensor]:
    """What `saved_activation_bytes` counts, storage by storage, in the order of saving.

    Saved-tensor hooks inside the model's forward (activation offloading, checkpointing) are innermost, so they and not
    this function's hooks get the tensors saved there. Counted then are the tensors inside what their pack hook returns
    (tensors, nested tuples, lists and dicts); an opaque object counts nothing, which is right for
    `torch.utils.checkpoint` and can be checked with `kept_bytes_by_allocator`.

    Args:
        model: as for `saved_activation_bytes`.
        batch: as for `saved_activation_bytes`.
    """
    given = [*model.parameters(), *model.buffers(), *tensors_in(batch)]
    with measured_training(model, batch), tracked_module_path(model) as module_path:
        recorder = _Recorder(module_path)
        with recorder.recording():
            output = call_model(model, batch)
        operators = _operators_by_packed_object(tensors_in(output))
        given.extend([*model.parameters(), *model.buffers()])  # also those made by the forward
        seen = {_storage_key(tensor) for tensor in given}
        result = []
        for record in recorder.records:
            packed_object = record.packed_object()
            if packed_object is None:  # its graph is gone: nothing is kept
                continue
            for tensor in record.tensors:
                key = _storage_key(tensor)
                if key in seen:
                    continue
                seen.add(key)
                holder = operators.get(id(packed_object), _Holder(""))
                result.append(
                    SavedTensor(
                        shape=tuple(tensor.shape),
                        dtype=tensor.dtype,
                        device=tensor.device,
                        bytes=tensor.untyped_storage().nbytes(),
                        operator=holder.operator,
                        module=record.module,
                        packed=record.packed,
                        bits=holder.bits,
                        leftover=holder.leftover,
                        exact=holder.exact,
                    )
                )
        return result


class _Handle:
    """What the counting hooks give autograd to hold: alive exactly as long as the node that saved the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@dataclass(frozen=True)
class _Record:
    """Tensors of one pack; holding them keeps their storages from being freed, so that no address is used twice."""

    tensors: list[Tensor]
    module: str
    packed: bool
    packed_object: Callable[[], Any]


class _Recorder:
    def __init__(self, module_path: Callable[[], str]) -> None:
        self.records: list[_Record] = []
        self._module_path = module_path

    def _pack(self, tensor: Tensor) -> _Handle:
        detached = tensor.detach()  # the tensor itself would close a cycle through its own node
        handle = _Handle(detached)
        self.records.append(_Record([detached], self._module_path(), False, weakref.ref(handle)))
        return handle

    def _pack_inner(self, pack_hook: Callable[[Tensor], Any], tensor: Tensor) -> Any:
        packed = pack_hook(tensor)
        tensors = [part.detach() for part in tensors_in(packed)]
        if tensors:
            self.records.append(_Record(tensors, self._module_path(), True, lambda: packed))
        return packed

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Counts what is saved inside, including what saved-tensor hooks entered inside make of it."""
        original_enter = saved_tensors_hooks.__enter__

        def enter(hooks: saved_tensors_hooks) -> None:
            pack_hook = hooks.pack_hook
            hooks.pack_hook = lambda tensor: self._pack_inner(pack_hook, tensor)
            try:
                original_enter(hooks)
            finally:
                hooks.pack_hook = pack_hook

        with saved_tensors_hooks(self._pack, lambda handle: handle.tensor):
            saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]
            try:
                yield
            finally:
                saved_tensors_hooks.__enter__ = original_enter  # type: ignore[method-assign]


def _storage_key(tensor: Tensor) -> int:
    """Identity of a tensor's storage while it is alive; also for meta and fake tensors, whose addresses are all 0."""
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True)
class _Holder:
    """The node that holds a packed object, and the code the object is part of."""

    operator: str
    bits: int | None = None
    leftover: bool = False
    exact: bool = False


def _bits_of(codec: Any) -> int | None:
    bits = getattr(codec, "num_bits", None)
    return bits if isinstance(bits, int) else None


def _operators_by_packed_object(outputs: list[Tensor]) -> dict[int, _Holder]:
    """The first node found to hold each packed object, by the object's `id`."""
    holders: dict[int, _Holder] = {}
    nodes: list[Node] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    visited = set(nodes)
    while nodes:
        node = nodes.pop()
        for attribute in dir(node):
            if attribute.startswith("_raw_saved_"):
                value = getattr(node, attribute)
                for saved in value if isinstance(value, (tuple, list)) else (value,):
                    packed = getattr(saved, "data", None)  # the packed object; reading it calls no unpack hook
                    if packed is None:
                        continue
                    holders.setdefault(id(packed), _Holder(node.name(), _bits_of(getattr(node, "codec", None))))
                    for handle in getattr(packed, "handles", ()):  # codes of one saved tensor
                        codec = getattr(packed, "codec", None)
                        exact = getattr(codec, "exact", False)
                        holders.setdefault(id(handle), _Holder(node.name(), _bits_of(codec), True, exact))
        for following, _ in node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                nodes.append(following)
    return holders
