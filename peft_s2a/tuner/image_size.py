"""Remembers the size of the image that the model is processing, by which prompts find their grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ImageSize:
    """Sizes of the image in the current forward pass of the base model."""

    def __init__(self) -> None:
        self.current: tuple[int, ...] | None = None

    def observe(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the base model."""
        self.current = None
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.dim() >= 4 and value.dtype.is_floating_point:
                self.current = tuple(value.shape[2:])
                return
