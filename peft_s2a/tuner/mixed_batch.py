"""Different adapters for the items of one batch: `model(images, adapter_names=[...])`, in inference.

Each item names its adapter; `"__base__"` is none. The base model runs once on the whole batch; what the adapters add is
added item by item. While the model runs, the names are known to the tuner layers of this thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

BASE = "__base__"
"""The name that stands for the base model alone."""


class _Current(threading.local):
    def __init__(self) -> None:
        self.names: Sequence[str] | None = None


_CURRENT = _Current()


def mixed_names() -> Sequence[str] | None:
    """The adapter of each item of the batch that this thread is running, or None where all have the active ones."""
    return _CURRENT.names


@contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str], known: Iterable[str]) -> Iterator[None]:
    """Runs the model with one adapter for each item.

    Args:
        names: one name an item.
        known: the adapters that the model has.

    Raises:
        ValueError: in training mode, or for a name that is not known.
    """
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    unknown = sorted(set(names) - {BASE} - set(known))
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

    def pass_names(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "adapter_names": names}

    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    handles = [wrapper.register_forward_pre_hook(pass_names, with_kwargs=True) for wrapper in wrappers]
    outer, _CURRENT.names = _CURRENT.names, names
    try:
        yield
    finally:
        _CURRENT.names = outer
        for handle in handles:
            handle.remove()


def check_length(num_items: int, names: Sequence[str]) -> None:
    """Raises ValueError unless there is a name for each item."""
    if num_items != len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {num_items} respectively. A layer whose input has something else than the batch in its "
            "first dimension, such as windows, cannot mix adapters: run each adapter on its own batch."
        )


def rows_of_items(values: Mapping[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor | None:
    """For each item the value of its adapter, stacked: (items, *shape); zeros for one without. None if none has any."""
    present = [name for name in dict.fromkeys(names) if name in values]
    if not present:
        return None
    first = values[present[0]]
    table = torch.stack([torch.zeros_like(first), *(values[name] for name in present)])
    places = {name: place for place, name in enumerate(present, 1)}
    return table[torch.tensor([places.get(name, 0) for name in names], device=first.device)]


def items_of(name: str, names: Sequence[str]) -> list[int]:
    """The places of the items that have this adapter."""
    return [place for place, other in enumerate(names) if other == name]
