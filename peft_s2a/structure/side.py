"""The lite side branch: channel average pooling, a small trainable branch and the way back up.

The block's input (D channels) is averaged over groups of s channels without any parameter, a small network works on
the D/s channels, and its output is added to the block's output. Backward keeps D/s-wide features only.

The last product is taken onto the block's output (`add_linear`): it has no memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

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
        divisible = x if whole * reduction == channels else x.narrow(dim, 0, whole * reduction)
        groups = torch.unflatten(divisible, dim, (whole, reduction))
        # not `mean`, whose gradient is divided after it is spread over the groups: one more tensor of the size of x
        # torch adds up shorter dtypes in float32; only float16 is too narrow for the sum, and would be cast as a whole
        sums = groups.sum(dim + 1, dtype=torch.float32 if x.dtype == torch.float16 else None)
        pooled.append((sums / reduction).to(x.dtype))
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


def add_linear(
    total: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dim: int, in_place: bool
) -> torch.Tensor:
    """`total + (W input + b)`, a function that modes may replace as they do those of torch.

    Args:
        total: features with C channels in dimension `dim`, 1 or the last one.
        input: (B, *sizes, d), channels last, whatever `dim` is.
        weight: (C, d).
        bias: (C).
        in_place: whether the sum may take the memory of `total`; a mode does so, torch's own functions do not.

    Returns:
        the sum, in the dtype of `total`.
    """
    tensors = (total, input, weight, bias)
    if not torch.compiler.is_compiling() and has_torch_function(tensors):
        result: torch.Tensor = handle_torch_function(add_linear, tensors, *tensors, dim, in_place)
        return result
    product = F.linear(input, weight, bias).to(total.dtype)
    return total + (product if dim % total.dim() == total.dim() - 1 else product.movedim(-1, dim))


def pool_for_side(x: torch.Tensor, shape: BlockShape, reduction: int) -> torch.Tensor:
    """What the side branch works on: the block's input, averaged over groups of channels.

    Args:
        x: laid out as `shape.layout` says.

    Returns:
        x with D/s channels (rounded up).

    Raises:
        ValueError: if x does not have the channels the branch was made for.
    """
    dim = shape.channel_dim % x.dim()
    if x.shape[dim] != shape.channels:
        raise _belongs_elsewhere("input", shape.channels, x, shape)
    return channel_average_pool(x, reduction, dim)


def add_side(
    output: torch.Tensor, pooled: torch.Tensor, weights: SideWeights, shape: BlockShape, in_place: bool = False
) -> torch.Tensor:
    """The block's output with the side branch added to it.

    Where a block changes the number of positions (a strided block), the pooled features are averaged over the
    positions to the output's; where it changes the channels, the way up leads to the output's channels.

    Args:
        output: the block's output, laid out as `shape.layout` says.
        pooled: what `pool_for_side` gives.
        in_place: whether the sum may take the memory of `output`.

    Returns:
        a tensor of the output's shape and dtype.

    Raises:
        ValueError: if the output does not have the channels the branch was made for.
    """
    dim = shape.channel_dim % pooled.dim()
    if pooled.dim() != output.dim() or output.shape[dim] != weights.up_weight.shape[0]:
        raise _belongs_elsewhere("output", weights.up_weight.shape[0], output, shape)
    small = pooled.to(weights.down_weight.dtype).movedim(dim, -1)
    sizes = tuple(output.shape[2:]) if dim == 1 else tuple(output.shape[1:-1])
    small = _pool_positions(small, sizes)
    hidden = F.gelu(F.linear(small, weights.down_weight, weights.down_bias))
    return add_linear(output, hidden, weights.up_weight, weights.up_bias, dim, in_place)


def _belongs_elsewhere(end: str, channels: int, found: torch.Tensor, shape: BlockShape) -> ValueError:
    return ValueError(
        f"The side branch was made for an {end} of {channels} channels ({shape.layout}) and gets {tuple(found.shape)}: "
        "the adapter belongs to another architecture, or set side_reduction=0."
    )
