"""Work on the pieces of a tensor, and how a simulation is spared most of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

Bounds = Iterator[tuple[int, int]]


class ShortensLoops(TorchDispatchMode):
    """A mode that runs what is done piece by piece all at once, and accounts for the difference itself."""

    def shortened(self, total: int, step: int) -> Bounds:
        """Bounds that cover `[0, total)`, every start a multiple of `step`."""
        raise NotImplementedError

    def all_at_once(self, run: Callable[[Tensor], Any], x: Tensor, size: int) -> Any:
        """`run(x)`, which does in one piece what otherwise is done in pieces of `size` items each."""
        raise NotImplementedError

    def made_at_once(self, tensor: Tensor) -> None:
        """Says that the first piece makes this in full."""
        raise NotImplementedError


def shortening_mode() -> ShortensLoops | None:
    """The mode that shortens loops here, if any."""
    if torch.compiler.is_compiling():
        return None
    stack = _get_current_dispatch_mode_stack()
    return next((mode for mode in stack if isinstance(mode, ShortensLoops)), None)


def piece_bounds(total: int, step: int) -> Bounds:
    """Splits `[0, total)` into pieces of `step`, the last of which may be smaller.

    Inside a `ShortensLoops` mode the pieces are the mode's; otherwise they are the same wherever this runs.
    """
    step = max(step, 1)
    mode = shortening_mode()
    if mode is not None:
        yield from mode.shortened(total, step)
        return
    for start in range(0, total, step):
        yield start, min(start + step, total)
