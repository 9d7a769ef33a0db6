"""Sets of torch functions, for what the mode does around a call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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

FORWARD_ONLY = frozenset({F.gelu, F.silu, F.mish, F.hardswish, F.elu, F.softplus, torch.tanh, torch.sigmoid})
"""Functions that save memory in a forward pass without gradients too: their result takes the place of their input."""

METADATA = frozenset(
    {
        Tensor.shape.__get__,  # type: ignore[attr-defined]
        Tensor.dtype.__get__,  # type: ignore[attr-defined]
        Tensor.device.__get__,
        Tensor.layout.__get__,  # type: ignore[attr-defined]
        Tensor.ndim.__get__,  # type: ignore[attr-defined]
        Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
        Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
        Tensor.grad_fn.__get__,  # type: ignore[union-attr]
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.stride,
        Tensor.is_contiguous,
        Tensor.is_floating_point,
    }
)
"""Functions that do not look at the numbers of a tensor."""
