"""Plain layers in the place of quantised ones, for a run that asks for shapes and dependencies alone.

A quantised linear layer keeps its weight in a class of its own (packed integers with scales beside them), and neither
survives on a meta device. What it computes has the shape of an ordinary linear layer.
"""

from __future__ import annotations

import torch
from torch import nn


def is_quantized(layer: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as something else than a plain tensor of floating point numbers."""
    if not isinstance(layer, nn.Linear):
        return False
    weight = layer.weight
    plain = type(weight) is nn.Parameter and type(weight.data) is torch.Tensor
    return not (plain and weight.is_floating_point())


def with_plain_layers(copy: nn.Module, quantized: list[str], dtype: torch.dtype) -> nn.Module:
    """A copy of a model on the meta device with ordinary linear layers in the place of quantised ones.

    Args:
        copy: the copy; it is changed.
        quantized: names of the quantised layers in the model that was copied.
        dtype: dtype of the new layers.
    """
    for name in quantized:
        layer = copy.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        has_bias = layer.bias is not None
        plain = nn.Linear(layer.in_features, layer.out_features, has_bias, device="meta", dtype=dtype)
        parent, _, child = name.rpartition(".")
        setattr(copy.get_submodule(parent), child, plain)
    return copy
