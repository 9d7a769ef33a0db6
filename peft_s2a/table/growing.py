"""Calls whose results may be rebuilt from smaller parts."""

from __future__ import annotations

import torch
from torch import Tensor

GROWING = frozenset(
    {
        torch.add,
        Tensor.add,
        Tensor.__add__,
        Tensor.__radd__,
        Tensor.expand,
        Tensor.reshape,
        torch.reshape,
        Tensor.repeat,
        Tensor.contiguous,
        Tensor.view,
        Tensor.unsqueeze,
        torch.unsqueeze,
        Tensor.permute,
        Tensor.__getitem__,
    }
)
"""Functions whose results, when they need no gradient and outgrow their parts, are remembered with their parts."""
