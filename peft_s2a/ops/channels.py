"""Sums and products by channels, in more bits than the tensor has.

Where dtypes differ torch casts whole tensors first on a CPU; here they are cast a few channels at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..codecs.chunked import CPU_CHUNK
from ..pieces import piece_bounds


def channel_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over all dimensions but the second, `(C,)`, taken in `dtype`."""
    over = [0, *range(2, x.dim())]
    parts = [x[:, channels].sum(over, dtype=dtype) for channels in _cast_at_a_time(x, dtype)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def times_channels(x: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """Writes `x * factor`, multiplied in the wider of their dtypes, to `out`, which may be x.

    Args:
        x: `(N, C, ...)`.
        factor: `(C,)`.
        out: like x.
    """
    factor = factor.view(-1, *[1] * (x.dim() - 2))
    for channels in _cast_at_a_time(x, factor.dtype):
        torch.mul(x[:, channels], factor[channels], out=out[:, channels])
    return out


def _cast_at_a_time(x: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """The channels of x, in pieces if x would be cast to `dtype` as a whole."""
    if x.dtype == dtype or x.device.type != "cpu" or x.numel() <= CPU_CHUNK or torch.compiler.is_compiling():
        yield slice(None)
        return
    for start, stop in piece_bounds(x.shape[1], CPU_CHUNK * x.shape[1] // x.numel()):
        yield slice(start, stop)
