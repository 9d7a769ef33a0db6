"""The allocator's side: which blocks were allocated and freed while something ran."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from .running import Batch, call_model, measured_training, model_device, training_loss

PHASE_PREFIX = "peft_s2a::"
"""Prefix of the `torch.profiler.record_function` scopes that name the phases of a step."""


@dataclass(frozen=True)
class MemoryEvent:
    """One block allocated or freed.

    Attributes:
        time: seconds since the first event of the recording.
        bytes: size of the block, negative if it was freed.
        block: number of the block, the same for its allocation and its free.
        operator: innermost named scope in which it happened, e.g. `"aten::addmm"`; `""` if there is none.
        phase: the scope beginning with `PHASE_PREFIX`, without the prefix; `""` if there is none.
    """

    time: float
    bytes: int
    block: int
    operator: str
    phase: str


def record_memory_events(function: Callable[[], Any], device: torch.device) -> list[MemoryEvent]:
    """Allocator events on `device` while `function` runs, in order of time.

    Freeing a block that was allocated before is not recorded, so the running sum of `bytes` is what is live above the
    start. What `function` returns is freed after the recording. Blocks that libraries take from the system behind
    torch's back (oneDNN's scratch memory) are unknown to the allocator.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler writes lines of its own to stderr
    gc.collect()  # so that garbage of before is not freed inside
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        result = function()
    del result
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    found: list[tuple[int, int, int, str]] = []  # nanoseconds, bytes, address, operator
    phases: list[tuple[int, int, str]] = []  # nanoseconds from and to, name
    pending = [(root, "") for root in reversed(profiler.profiler.kineto_results.experimental_event_tree())]
    while pending:  # depth first, in order
        event, operator = pending.pop()
        fields = event.extra_fields
        if isinstance(fields, torch._C._profiler._ExtraFields_Allocation):
            if fields.device.type == device.type and device.index in (None, fields.device.index):
                found.append((event.start_time_ns, fields.alloc_size, fields.ptr, operator))
            continue
        if event.name.startswith(PHASE_PREFIX):
            phases.append((event.start_time_ns, event.end_time_ns, event.name.removeprefix(PHASE_PREFIX)))
        pending.extend((child, event.name) for child in reversed(event.children))
    found.sort(key=lambda item: item[0])  # stable: events of one instant stay in order

    live: dict[int, int] = {}
    events: list[MemoryEvent] = []
    for time, size, address, operator in found:
        if size > 0:
            live[address] = block = len(events)
        elif address in live:
            block = live.pop(address)
        else:  # allocated before the recording
            continue
        phase = next((name for start, end, name in phases if start <= time <= end), "")
        events.append(MemoryEvent((time - found[0][0]) * 1e-9, size, block, operator, phase))
    return events


def kept_bytes_by_allocator(model: nn.Module, batch: Batch) -> int:
    """Live bytes after one training forward (outputs and loss held) minus live bytes before.

    An independent measure of `saved_activation_bytes` that also sees what saved-tensor hooks, `ctx` attributes and the
    model's own attributes hold. It counts the outputs and the loss too, whether or not backward needs them.

    Args:
        model: any module; it is run in train mode and then put back (mode, buffers, gradients, random state).
        batch: a mapping for `model(**batch)`, a tuple or list for `model(*batch)`, a tensor for `model(batch)`.

    Returns:
        Bytes: on CUDA as rounded by torch's caching allocator.

    Raises:
        ValueError: if nothing in the output needs a gradient.
    """
    device = model_device(model, batch)

    def forward() -> tuple[Any, Any]:
        output = call_model(model, batch)
        return output, training_loss(output)

    with measured_training(model, batch):
        result = forward()  # warm-up: lazily made tensors are not activations
        del result
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            result = forward()
            kept = torch.cuda.memory_allocated(device) - before
            del result
            return kept
        return sum(event.bytes for event in record_memory_events(forward, device))
