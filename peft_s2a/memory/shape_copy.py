"""Copies of a model whose tensors have shapes but no data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor):
                yield value


def copy_with_tensors(model: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the model in which `make(tensor)` stands in the place of every parameter, buffer and attribute.

    Parameters stay parameters, with or without gradient as they were; one that is shared stays shared.
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors_of(model):
        if id(tensor) not in memo:
            made = make(tensor)
            memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    return copy.deepcopy(model, memo)


def empty_as(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the same shape, strides and dtype on `device`."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device."""
    return copy_with_tensors(model, lambda tensor: empty_as(tensor, "meta"))
