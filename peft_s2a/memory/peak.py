"""The allocator's peak during one training step: what decides whether a step fits on a card."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import nn
from torch.optim import Optimizer
from torch.profiler import record_function

from .allocator import PHASE_PREFIX, record_memory_events
from .running import Batch, call_model, measured_training, model_device, tensors_in, training_loss


def peak_step_bytes(model: nn.Module, batch: Batch, optimizer: Optimizer | None = None) -> int:
    """Peak of live bytes during one training step, above what was live before it.

    The step is forward, `loss.backward()` and, if given, `optimizer.step()`; the loss is the output's own, else the sum
    of the means of its floating-point tensors. A warm-up step comes first, so parameters, optimizer state and lazily
    made tensors are there before and **not** counted (`optimizer_state_bytes` tells the state). Counted are
    activations, temporaries and gradients, which are `None` when the step starts.

    Args:
        model: any module; it is run in train mode and then put back: mode, buffers, gradients, random state, and with
            an optimizer the parameters and the optimizer's state.
        batch: a mapping for `model(**batch)`, a tuple or list for `model(*batch)`, a tensor for `model(batch)`.
        optimizer: one that holds parameters of the model.

    Returns:
        Bytes. On CPU from the profiler's memory events, on CUDA from `torch.cuda.max_memory_allocated`. Memory that
        libraries take from the system themselves (oneDNN's scratch memory) is not seen.

    Raises:
        ValueError: if nothing in the output needs a gradient.
    """
    device = model_device(model, batch)
    with prepared_step(model, batch, optimizer) as step:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            step()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        events = record_memory_events(step, device)
    return max(accumulate((event.bytes for event in events), initial=0))


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state, e.g. both moments of AdamW after its first step."""
    return sum(tensor.nbytes for state in optimizer.state.values() for tensor in tensors_in(state))


@contextmanager
def prepared_step(model: nn.Module, batch: Batch, optimizer: Optimizer | None) -> Iterator[Callable[[], None]]:
    """Gives a training step that is warmed up; on leaving, model and optimizer are as they were."""

    def step() -> None:
        with record_function(f"{PHASE_PREFIX}forward"):
            output = call_model(model, batch)
            loss = training_loss(output)
        with record_function(f"{PHASE_PREFIX}backward"):
            loss.backward()
        if optimizer is not None:
            with record_function(f"{PHASE_PREFIX}optimizer"):
                optimizer.step()

    with measured_training(model, batch), _restored_optimizer(optimizer):
        step()
        for parameter in model.parameters():
            parameter.grad = None
        yield step


@contextmanager
def _restored_optimizer(optimizer: Optimizer | None) -> Iterator[None]:
    """Puts the optimizer's parameters and state back; the copies lie in host memory."""
    if optimizer is None:
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    state = copy.deepcopy(optimizer.state_dict())
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(state)
