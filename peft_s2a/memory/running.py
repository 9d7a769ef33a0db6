"""One training forward of any model on any batch, and a guard that puts the model back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Batch = Tensor | Mapping[str, Any] | tuple[Any, ...] | list[Any]
"""A tensor, positional arguments (tuple or list) or keyword arguments (mapping) of a model's `forward`."""


def call_model(model: nn.Module, batch: Batch) -> Any:
    """`model(**batch)` for a mapping, `model(*batch)` for a tuple or list, `model(batch)` for a tensor.

    Raises:
        TypeError: for any other type of batch.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    raise TypeError(f"batch must be a tensor, a mapping, a tuple or a list, not {type(batch).__name__}.")


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors inside nested containers, mappings and model outputs."""
    if isinstance(value, Mapping):
        value = dict(value)
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def training_loss(output: Any) -> Tensor:
    """The loss a measured step runs backward from.

    `output.loss` (or `output["loss"]`) if there is one, else the sum of the means of all floating-point tensors of the
    output that need a gradient. A mean gives every element of the output a gradient, as a real loss does.

    Raises:
        ValueError: if nothing in the output needs a gradient, i.e. nothing is trainable.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        terms = [tensor.float().mean() for tensor in tensors_in(output) if tensor.requires_grad]
        if terms:
            loss = torch.stack(terms).sum() if len(terms) > 1 else terms[0]
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise ValueError("No output of the model needs a gradient: is any parameter trainable?")
    return loss


def model_device(model: nn.Module, batch: Batch) -> torch.device:
    """The device a step runs on: that of the first parameter, else of the batch, else the CPU."""
    parameter = next(model.parameters(), None)
    if parameter is not None:
        return parameter.device
    tensors = tensors_in(batch)
    return tensors[0].device if tensors else torch.device("cpu")


@contextmanager
def measured_training(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Train mode with gradients inside; outside, the model is as it was.

    Restored on leaving, also after an error: the train / eval flag of every module, every buffer (BatchNorm statistics
    move in a training forward), every parameter's `.grad` and the random state of the CPU and of the model's device.
    Gradients are `None` at the start. Parameter values are the caller's business.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    device = model_device(model, batch)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            model.train()
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, training in flags:
                module.training = training
            for module, name, buffer, content in buffers:
                module._buffers[name] = buffer
                if buffer is not None and content is not None and not torch.equal(buffer, content):
                    with torch.no_grad():
                        buffer.copy_(content)
