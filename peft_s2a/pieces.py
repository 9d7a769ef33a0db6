"""Loops over the pieces of a tensor, and how a simulation shortens them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

Bounds = Iterator[tuple[int, int]]


class ShortensLoops(TorchDispatchMode):
    """A mode that runs a loop over many pieces as a loop over few, and accounts for the rest itself."""

    def shortened(self, total: int, step: int) -> Bounds:
        """Bounds that cover `[0, total)`, every start a multiple of `step`."""
        raise NotImplementedError


def piece_bounds(total: int, step: int) -> Bounds:
    """Splits `[0, total)` into pieces of `step`, the last of which may be smaller.

    Inside a `ShortensLoops` mode the pieces are the mode's; otherwise they are the same wherever this runs.
    """
    step = max(step, 1)
    if not torch.compiler.is_compiling():
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, ShortensLoops):
                yield from mode.shortened(total, step)
                return
    for start in range(0, total, step):
        yield start, min(start + step, total)
