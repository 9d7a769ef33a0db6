"""The lite side branch: channel average pooling, a small trainable branch and the way back up.

The block's input (D channels) is averaged over groups of s channels without any parameter, a small network works on
the D/s channels, and its output is added to the block's output. Backward keeps D/s-wide features only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .layout import BlockShape


class SideWeights(NamedTuple):
    """Weights of one side branch, with d the pooled width.

    Args:
        down_weight: (d, d).
        down_bias: (d).
        up_weight: (out_channels, d), zero at the start.
        up_bias: (out_channels), zero at the start.
    """

    down_weight: torch.Tensor
    down_bias: torch.Tensor
    up_weight: torch.Tensor
    up_bias: torch.Tensor


def pooled_width(channels: int, reduction: int) -> int:
    """Channels after pooling groups of `reduction` channels; a last, smaller group counts as one."""
    return -(-channels // reduction)


def channel_average_pool(x: torch.Tensor, reduction: int, dim: int = -1) -> torch.Tensor:
    """Means over groups of `reduction` neighbouring channels; backward keeps nothing of x.

    Args:
        x: features with D channels in dimension `dim`.
        reduction: s. Where s does not divide D the last group is smaller.

    Returns:
        x with D/s channels (rounded up) in `dim`.
    """
    dim = dim % x.dim()
    channels = x.shape[dim]
    whole = channels // reduction
    pooled = []
    if whole:
        groups = torch.unflatten(x.narrow(dim, 0, whole * reduction), dim, (whole, reduction))
        pooled.append(groups.mean(dim + 1))
    if channels % reduction:
        pooled.append(x.narrow(dim, whole * reduction, channels % reduction).mean(dim, keepdim=True))
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim)


def _pool_positions(small: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """Averages channels-last features (B, *sizes_in, d) to (B, *sizes, d)."""
    if tuple(small.shape[1:-1]) == sizes:
        return small
    pool: Callable[..., torch.Tensor] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[
        len(sizes)
    ]
    return pool(small.movedim(-1, 1), sizes if len(sizes) > 1 else sizes[0]).movedim(1, -1)


def side_for(
    x: torch.Tensor, output: torch.Tensor, weights: SideWeights, shape: BlockShape, reduction: int
) -> torch.Tensor:
    """What the side branch adds to the block's output.

    Where a block changes the number of positions (a strided block), the pooled features are averaged over the
    positions to the output's; where it changes the channels, the way up leads to the output's channels.

    Args:
        x: the block's input, laid out as `shape.layout` says.
        output: the block's output, in the same layout.

    Returns:
        a tensor of the output's shape and dtype.

    Raises:
        ValueError: if input or output do not have the channels the branch was made for.
    """
    dim = shape.channel_dim % x.dim()
    if x.shape[dim] != shape.channels or output.shape[dim] != weights.up_weight.shape[0] or x.dim() != output.dim():
        raise ValueError(
            f"The side branch was made for {shape.channels} channels in and {weights.up_weight.shape[0]} out "
            f"({shape.layout}) and gets {tuple(x.shape)} in and {tuple(output.shape)} out: the adapter belongs to "
            "another architecture, or set side_reduction=0."
        )
    small = channel_average_pool(x, reduction, dim).to(weights.down_weight.dtype).movedim(dim, -1)
    sizes = tuple(output.shape[2:]) if dim == 1 else tuple(output.shape[1:-1])
    small = _pool_positions(small, sizes)
    hidden = F.gelu(F.linear(small, weights.down_weight, weights.down_bias))
    side = F.linear(hidden, weights.up_weight, weights.up_bias).to(output.dtype)
    return side if dim == side.dim() - 1 else side.movedim(-1, dim)
