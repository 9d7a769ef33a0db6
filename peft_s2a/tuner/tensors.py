"""The feature among a block's arguments and results."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The first tensor among positional arguments, then keyword arguments; looks one level into tuples and mappings."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
        for item in inner:
            if isinstance(item, torch.Tensor):
                return item
    return None


def replace_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], old: torch.Tensor, new: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with one tensor replaced at its first place, directly or one level down."""
    for index, value in enumerate(args):
        if value is old or (isinstance(value, (tuple, list, Mapping)) and first_tensor((value,), {}) is old):
            return (*args[:index], replace_first(value, old, new), *args[index + 1 :]), kwargs
    for key, value in kwargs.items():
        if value is old or (isinstance(value, (tuple, list, Mapping)) and first_tensor((value,), {}) is old):
            return args, {**kwargs, key: replace_first(value, old, new)}
    return args, kwargs


def replace_first(value: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    """A tensor, tuple, list or mapping with one tensor replaced; its type is kept."""
    if value is old:
        return new
    if isinstance(value, tuple):
        items = [new if item is old else item for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return [new if item is old else item for item in value]
    if isinstance(value, Mapping):
        for key, item in value.items():
            if item is old:
                replaced: Any = copy.copy(value)
                replaced[key] = new
                return replaced
    return value
