"""The bias delta: a trainable vector added to the bias of a frozen layer.

For `y = f(x) + b` the gradient of the delta is the sum of `grad_output` over everything but the channels: nothing of
the input is kept for it. The delta takes the place of the layer's own bias while the layer runs, so the layer's
kernel adds it and no extra pass over the output is made.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

ADDING_LAST = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
"""Layers whose own forward adds the bias last; the batch norms share one."""

NORM_NAMES = ("batchnorm", "groupnorm", "layernorm", "rmsnorm")
"""A layer whose class name contains one of these, with a per-channel weight, counts as a norm."""


@dataclass(frozen=True)
class BiasSlot:
    """One bias of a layer.

    Args:
        leaf: name of the adapter's leaf that holds the delta.
        owner: path of the module that owns the bias, below the layer (`""` is the layer itself).
        name: attribute of the bias.
        width: number of channels.
        in_place: whether the layer's forward takes the bias from the attribute; otherwise the delta is added to the
            output.
    """

    leaf: str
    owner: str
    name: str
    width: int
    in_place: bool


def is_batch_norm(layer: nn.Module) -> bool:
    """Whether the layer keeps running statistics of its input."""
    return isinstance(layer, _BatchNorm)


def _is_norm(layer: nn.Module) -> bool:
    if isinstance(layer, (nn.LayerNorm, nn.GroupNorm, _BatchNorm)):
        return True
    if not any(name in type(layer).__name__.lower() for name in NORM_NAMES):
        return False
    weight = getattr(layer, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 1 and not any(True for _ in _child_parameters(layer))


def _child_parameters(layer: nn.Module) -> Any:
    return (parameter for child in layer.children() for parameter in child.parameters())


def is_supported(layer: nn.Module) -> bool:
    """Whether a bias delta can be put on this layer.

    Supported are linear layers, convolutions, layer / RMS / batch / group norms (their subclasses and look-alikes of
    transformers and timm too) and `nn.MultiheadAttention`. The output projection inside `nn.MultiheadAttention` is
    not: its forward is never called; the attention layer itself carries its delta.
    """
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return False
    return isinstance(layer, (nn.Linear, _ConvNd, Conv1D, nn.MultiheadAttention)) or _is_norm(layer)


def _bias_width(layer: nn.Module) -> int:
    for name in ("out_features", "out_channels", "nf", "num_features", "num_channels"):
        width = getattr(layer, name, None)
        if isinstance(width, int):
            return width
    weight = getattr(layer, "weight", None)
    if isinstance(weight, torch.Tensor):
        return weight.numel()
    normalized_shape = getattr(layer, "normalized_shape", None)
    if normalized_shape is not None:
        return int(torch.Size(normalized_shape).numel())
    raise ValueError(
        f"The number of channels of {type(layer).__name__} cannot be found; leave it out of target_modules."
    )


def _holder(layer: nn.Module, name: str) -> dict[str, Any] | None:
    """The dictionary in which the layer has this attribute: parameters, buffers of frozen norms, or plain attributes.

    Plain ones come first, as they do when the layer reads them: while a sharded model runs (FSDP with
    `use_orig_params`) its parameters are attributes.
    """
    if isinstance(vars(layer).get(name), torch.Tensor):
        return vars(layer)
    for registered in (layer._parameters, layer._buffers):
        if name in registered:
            return registered
    return None


def bias_slots(layer: nn.Module) -> tuple[BiasSlot, ...]:
    """The biases of a supported layer.

    Raises:
        ValueError: for a layer that is not supported.
    """
    if not is_supported(layer):
        raise ValueError(
            f"A bias delta cannot be put on {type(layer).__name__}. Supported are linear layers, convolutions, layer, "
            "RMS, batch and group norms and nn.MultiheadAttention; change target_modules or exclude_modules."
        )
    if isinstance(layer, nn.MultiheadAttention):
        return (
            BiasSlot("s2a_bias_in", "", "in_proj_bias", 3 * layer.embed_dim, True),
            BiasSlot("s2a_bias", "out_proj", "bias", layer.embed_dim, True),
        )
    in_place = _holder(layer, "bias") is not None
    if _is_norm(layer) and getattr(layer, "weight", None) is None:
        in_place = False  # kernels of norms take a bias only together with a weight
    return (BiasSlot("s2a_bias", "", "bias", _bias_width(layer), in_place),)


def adds_bias_last(layer: nn.Module) -> bool:
    """Whether the output is something plus the bias, so that a delta can as well be added to the output.

    True for torch's own layers and those without a bias of their own; not for a norm with an activation behind it.
    """
    forward = getattr(type(layer), "forward", None)
    return _holder(layer, "bias") is None or any(forward is cls.forward for cls in ADDING_LAST)


def input_width(layer: nn.Module) -> int | None:
    """Number of channels that the layer takes; `None` where it does not say."""
    for name in ("in_features", "in_channels", "nx", "embed_dim", "num_features", "num_channels"):
        width = getattr(layer, name, None)
        if isinstance(width, int):
            return width
    weight = getattr(layer, "weight", None)
    return weight.shape[0] if isinstance(weight, torch.Tensor) and weight.dim() > 0 else None


def find_channel_dim(layer: nn.Module) -> int:
    """Dimension of the channels in the output of a layer without a bias of its own: 1 or -1."""
    if isinstance(layer, (_BatchNorm, nn.GroupNorm, _ConvNd)) or getattr(layer, "data_format", "") == "channels_first":
        return 1
    return 1 if type(layer).__name__.lower().endswith(("2d", "3d")) else -1


class _Shared(threading.local):
    """Sums that several calls of one thread have in common."""

    def __init__(self) -> None:
        self.sums: dict[tuple[nn.Module, BiasSlot, int], tuple[torch.Tensor, torch.Tensor]] | None = None


_SHARED = _Shared()


@contextmanager
def shared_sums(share: bool = True) -> Iterator[None]:
    """Calls inside have one sum of bias and delta for each layer in common; `share=False`: none with those outside."""
    outer, _SHARED.sums = _SHARED.sums, {} if share else None
    try:
        yield
    finally:
        _SHARED.sums = outer


def _shared_bias(layer: nn.Module, slot: BiasSlot, delta: torch.Tensor) -> torch.Tensor:
    if _SHARED.sums is None or torch.compiler.is_compiling():
        return merged_bias(layer, slot, delta)
    key = layer, slot, id(delta)
    if key not in _SHARED.sums:
        _SHARED.sums[key] = delta, merged_bias(layer, slot, delta)  # holding the delta keeps its number its own
    return _SHARED.sums[key][1]


def merged_bias(layer: nn.Module, slot: BiasSlot, delta: torch.Tensor) -> torch.Tensor:
    """Bias plus delta, added in the wider of both dtypes and returned in the layer's dtype, shape (channels)."""
    owner = layer.get_submodule(slot.owner)
    bias: torch.Tensor | None = getattr(owner, slot.name, None)
    if bias is not None:
        total = bias.to(torch.promote_types(bias.dtype, delta.dtype)) + delta.reshape(bias.shape)
        return total.to(bias.dtype)
    weight = getattr(owner, "weight", None)
    if weight is None:
        weight = getattr(owner, "in_proj_weight", None)
    dtype = getattr(owner, "compute_dtype", None) or (weight.dtype if weight is not None else delta.dtype)
    return delta.to(dtype) if dtype.is_floating_point else delta


def can_stand_in(layer: nn.Module) -> bool:
    """Whether a `stand_in` can be called in the layer's place.

    Not while a graph is traced, and not where the layer's forward has been replaced by a function bound to the layer
    (accelerate's offloading does that).
    """
    return not torch.compiler.is_compiling() and "forward" not in vars(layer)


def stand_in(layer: nn.Module) -> Any:
    """A copy of the layer: the same parameters, buffers, children and hooks, the first three in its own dictionaries.

    What is put into those is seen by this copy alone, so that threads that run the model do not see each other's.
    """
    copy: Any = object.__new__(type(layer))
    vars(copy).update(vars(layer))
    for name in ("_parameters", "_buffers", "_modules"):
        vars(copy)[name] = dict(vars(layer)[name])
    return copy


def _with_biases(layer: nn.Module, biases: Mapping[BiasSlot, torch.Tensor]) -> Any:
    copy = stand_in(layer)
    for slot, bias in biases.items():
        owner = copy
        if slot.owner:
            owner = copy._modules[slot.owner] = stand_in(copy._modules[slot.owner])
        holder = _holder(owner, slot.name)
        assert holder is not None
        holder[slot.name] = bias
    return copy


def call_with_bias_deltas(
    layer: nn.Module, deltas: Mapping[BiasSlot, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls the layer with a delta on each of the given biases.

    The layer is called as a module: its own hooks run. The layer itself is left as it is.

    Args:
        deltas: for a slot, the delta of shape (channels).
    """
    biases = {slot: _shared_bias(layer, slot, delta) for slot, delta in deltas.items() if slot.in_place}
    if not biases:
        output = layer(*args, **kwargs)
    elif can_stand_in(layer):
        output = _with_biases(layer, biases)(*args, **kwargs)
    else:
        output = _call_with_swapped_biases(layer, biases, args, kwargs)
    for slot, delta in deltas.items():
        if not slot.in_place:
            shape = [1] * output.dim()
            shape[find_channel_dim(layer)] = slot.width
            output = output + delta.to(output.dtype).view(shape)
    return output


def _call_with_swapped_biases(
    layer: nn.Module, biases: Mapping[BiasSlot, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for slot, bias in biases.items():
            holder = _holder(layer.get_submodule(slot.owner), slot.name)
            assert holder is not None
            swapped.append((holder, slot.name, holder[slot.name]))
            holder[slot.name] = bias
        return layer(*args, **kwargs)
    finally:
        for holder, name, bias in swapped:
            holder[name] = bias
