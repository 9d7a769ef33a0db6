"""Sets of torch functions: whose results are rebuilt from smaller parts, and whose saved tensors may be coded."""

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

MULTIPLYING = frozenset(
    {
        torch.exp,
        Tensor.exp,
        torch.sin,
        Tensor.sin,
        torch.cos,
        Tensor.cos,
        torch.erf,
        Tensor.erf,
        torch.einsum,
        torch.tensordot,
        torch.baddbmm,
        F.bilinear,
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
    }
)
"""Functions outside the table whose backward multiplies with what they save: it may be kept in codes."""
