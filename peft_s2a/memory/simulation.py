"""Memory of a training step without data and without memory: a real step on fake tensors, every storage of it followed.

Parameters, activations and gradients are fake: they have a shape and a storage of a size, but no bytes. Torch runs
the step as it would run a real one, so every storage is made and freed when it would be, temporaries and gradients
included. What lies inside a kernel and is never a tensor is added by rule (`kernels.py`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from .module_path import tracked_module_path
from .running import Batch, call_model, tensors_in, training_loss
from .shape_copy import copy_with_tensors, empty_as
from .storages import Storage, StorageTracker

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
"""Makes an optimizer of the trained parameters, e.g. `torch.optim.AdamW`."""


class CannotSimulateError(RuntimeError):
    """The model's own code needs data: it cannot run on fake tensors."""


@dataclass(frozen=True)
class Allocation:
    """One storage that is live at the peak.

    Attributes:
        bytes: its size.
        operator: operator of torch that made it, e.g. `"aten::gelu"`.
        module: path of the innermost module whose forward was running; `""` outside of any.
        phase: `"forward"`, `"backward"` or `"optimizer"`.
        kind: `"kept"` (live between forward and backward), `"gradient"`, `"optimizer"` or `"temporary"`.
    """

    bytes: int
    operator: str
    module: str
    phase: str
    kind: str


@dataclass(frozen=True)
class SimulatedStep:
    """Bytes of one training step.

    Attributes:
        weights: parameters and buffers.
        batch: the batch's tensors.
        gradients: gradients at the end of backward.
        optimizer: the optimizer's state.
        kept: live between forward and backward above the loaded model: activations, output and loss.
        temporaries: what is live at the peak besides weights, batch, optimizer state, gradients and what is kept.
        step_peak: the most that is live in forward and backward above weights, batch and optimizer state.
        optimizer_peak: the most that is live in the optimizer's step above the same; gradients are part of it.
        flops: floating-point operations of products, convolutions and attention in forward and backward.
        live_at_peak: what `step_peak` (or `optimizer_peak`, if that is larger) is made of, largest first.
        live_bytes: bytes live in forward and backward after each allocation and each free, as `step_peak` counts them.
        fingerprint: the same for two steps whose allocations and frees follow each other in the same order.
    """

    weights: int
    batch: int
    gradients: int
    optimizer: int
    kept: int
    temporaries: int
    step_peak: int
    optimizer_peak: int
    flops: int
    live_at_peak: tuple[Allocation, ...] = field(repr=False)
    live_bytes: tuple[int, ...] = field(repr=False)
    fingerprint: int = field(repr=False)

    @property
    def peak(self) -> int:
        """The most that is live at all: what has to fit."""
        return self.weights + self.batch + self.optimizer + max(self.step_peak, self.optimizer_peak)


@contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    """Says which model needs data, and what the way out is.

    Raises:
        CannotSimulateError: for what torch raises when code asks a fake tensor for its numbers.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    try:
        yield
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        GuardOnDataDependentSymNode,
        NotImplementedError,
        RuntimeError,
    ) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CannotSimulateError(
            f"A training step of {type(model).__name__} cannot be simulated: {type(error).__name__}: {error} The "
            "forward must run on tensors without data. Measure instead: peft_s2a.memory.peak_step_bytes(model, batch)."
        ) from error


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Puts gradients back that a forward gave to this model instead of its copy.

    Raises:
        RuntimeError: if there were any.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    yield
    changed = [(parameter, gradient) for parameter, gradient in gradients if parameter.grad is not gradient]
    for parameter, gradient in changed:
        parameter.grad = gradient
    if changed:
        raise RuntimeError("a forward that was set on the model belongs to that object and does not follow a copy.")


def simulate_step(model: nn.Module, batch: Batch, optimizer: MakeOptimizer | None = None) -> SimulatedStep:
    """Predicts the memory of one training step (forward, backward, optimizer), without data and without memory.

    Args:
        model: any module, its tensors real, fake or on the meta device (then as on a CPU); it stays as it is.
        batch: a mapping for `model(**batch)`, a tuple or list for `model(*batch)`, a tensor for `model(batch)`; meta
            tensors will do.
        optimizer: makes the optimizer of the trained parameters; None: no optimizer.

    Returns:
        what `peak_step_bytes` measures as `step_peak`, and the rest of what is live.

    Raises:
        CannotSimulateError: if the model's forward needs data.
        ValueError: if nothing in the output needs a gradient.
    """
    with _explained(model), _untouched(model):
        return _simulate(model, batch, optimizer)


def _simulate(model: nn.Module, batch: Batch, optimizer: MakeOptimizer | None) -> SimulatedStep:
    def fake(tensor: Tensor) -> Tensor:
        return empty_as(tensor, "cpu" if tensor.device.type == "meta" else tensor.device)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.cache_enabled = False  # `fake_calls` does that, and forgets
    with _no_garbage_collection(), mode, torch.random.fork_rng(devices=[]), torch.enable_grad():
        model = copy_with_tensors(model, fake).train()
        batch = _mapped(fake, batch)
        parameters = list(model.parameters())
        loaded = [*parameters, *model.buffers()]
        given = tensors_in(batch)
        with tracked_module_path(model) as path:
            tracker = StorageTracker(path)
            tracker.ignore(loaded, weights=True)
            tracker.ignore(given, weights=False)
            with tracker:
                output = call_model(model, batch)
                loss = training_loss(output)
                forward_end = len(tracker.events)
                tracker.phase = "backward"
                loss.backward()
                tracker.close_section()
                del output, loss
                backward_end = len(tracker.events)
                gradients = [p.grad for p in parameters if p.grad is not None]
                state = _optimizer_step(tracker, optimizer, parameters)
        owners = {id(tracker.storage_of(g)): "gradient" for g in gradients}
        owners |= {id(tracker.storage_of(s)): "optimizer" for s in state}
        return _result(tracker, forward_end, backward_end, owners, _bytes(loaded), _bytes(given))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Storages are freed when their last reference goes, not when the collector happens to run; and it is faster."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _mapped(make: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    mapped: Batch = tree_map_only(Tensor, make, dict(batch) if isinstance(batch, Mapping) else batch)
    return mapped


def _bytes(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _optimizer_step(
    tracker: StorageTracker, make: MakeOptimizer | None, parameters: list[nn.Parameter]
) -> list[Tensor]:
    """Runs the optimizer's first step; returns the tensors of its state."""
    if make is None:
        return []
    tracker.phase = "optimizer"
    optimizer = make([p for p in parameters if p.requires_grad])
    optimizer.step()
    return [tensor for state in optimizer.state.values() for tensor in tensors_in(state)]


def _result(
    tracker: StorageTracker, forward_end: int, backward_end: int, owners: dict[int, str], weights: int, batch: int
) -> SimulatedStep:
    forward, backward = tracker.changes(0, forward_end), tracker.changes(forward_end, backward_end)
    update = tracker.changes(backward_end, len(tracker.events))
    step, changes = [*forward, *backward], [*forward, *backward, *update]
    live = list(accumulate(size for _, size in changes))

    def peak_in(start: int, stop: int) -> tuple[int, int]:
        return max(((live[i], i) for i in range(start, stop)), key=lambda item: item[0], default=(0, -1))

    step_peak, place = peak_in(0, len(step))
    state = sum(s.bytes for s, sign in tracker.events if sign > 0 and owners.get(id(s)) == "optimizer")
    # the state is made in the first step, and there before the following ones
    optimizer_peak, optimizer_place = peak_in(len(step), len(live))
    optimizer_peak = max(optimizer_peak - state, 0)
    if optimizer_peak > step_peak:
        place = optimizer_place

    def kind(storage: Storage) -> str:
        if id(storage) in owners:
            return owners[id(storage)]
        lasting = storage.born < forward_end and (storage.died is None or storage.died >= forward_end)
        return "kept" if lasting else "temporary"

    sizes: dict[Storage, int] = {}
    for storage, size in changes[: place + 1]:
        sizes[storage] = sizes.get(storage, 0) + size
    at_peak = [Allocation(size, s.operator, s.module, s.phase, kind(s)) for s, size in sizes.items() if size]
    return SimulatedStep(
        weights=weights,
        batch=batch,
        gradients=sum(s.bytes for s, sign in tracker.events if sign > 0 and owners.get(id(s)) == "gradient"),
        optimizer=state,
        kept=sum(size for _, size in forward),
        temporaries=sum(a.bytes for a in at_peak if a.kind == "temporary"),
        step_peak=step_peak,
        optimizer_peak=optimizer_peak,
        flops=tracker.flops,
        live_at_peak=tuple(sorted(at_peak, key=lambda a: -a.bytes)),
        live_bytes=tuple(live[: len(step)]),
        fingerprint=hash(tuple((s.operator, s.born) for s, _ in step)),
    )
