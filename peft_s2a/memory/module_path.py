"""Which module of a model is running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


@contextmanager
def tracked_module_path(model: nn.Module) -> Iterator[Callable[[], str]]:
    """Gives a function that tells the path of the innermost running module of `model`, `""` for the model itself.

    A module's own forward hooks run after it is left, so what they do counts for its parent.
    """
    names = {module: name for name, module in model.named_modules()}
    running: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        if module in names:
            running.append(names[module])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in names and running:
            running.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield lambda: running[-1] if running else ""
    finally:
        for handle in handles:
            handle.remove()
