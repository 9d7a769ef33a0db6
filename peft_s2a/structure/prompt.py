"""The low-rank prompt: `y = x + A B` on the feature that enters a block.

With `A` of shape (L, r) over the L positions and `B` of shape (r, D) over the D channels, the gradients are
`dA = sum_batch(dy) B^T` and `dB = A^T sum_batch(dy)`: nothing of x is kept.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch.nn import functional as F

from .layout import BlockShape

INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def interpolate_rows(
    rows: torch.Tensor, grid: tuple[int, ...], new_grid: tuple[int, ...], num_extra: int = 0
) -> torch.Tensor:
    """Rows of A for another grid: patch rows are interpolated over the grid, extra rows are kept.

    Args:
        rows: (L, r), L = num_extra + positions of `grid`.

    Returns:
        (num_extra + positions of `new_grid`, r).
    """
    if grid == new_grid:
        return rows
    extra, patches = rows[:num_extra], rows[num_extra:]
    patches = patches.T.reshape(1, rows.shape[1], *grid)
    wide = torch.promote_types(patches.dtype, torch.float32)
    patches = F.interpolate(patches.to(wide), size=new_grid, mode=INTERPOLATION[len(grid)], align_corners=False)
    return torch.cat([extra, patches.flatten(2)[0].T.to(rows.dtype)])


def resolve_grid(num_tokens: int, shape: BlockShape, image_size: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The patch grid of a token sequence.

    The saved grid where the length is the saved one and the image is not known to differ; otherwise the saved grid
    scaled with the image, or a square.

    Args:
        num_tokens: tokens of the sequence, extra tokens included.
        image_size: sizes of the image being processed, if known.

    Raises:
        ValueError: if the tokens fit no grid.
    """
    num_patches = num_tokens - shape.num_extra
    same_length = num_patches == math.prod(shape.grid)
    if same_length and (not image_size or not shape.image_size or image_size == shape.image_size):
        return shape.grid
    if image_size and len(image_size) == len(shape.image_size) == len(shape.grid):
        scaled = [size * cells / old for size, cells, old in zip(image_size, shape.grid, shape.image_size, strict=True)]
        rounded = ({round(s), math.floor(s), math.ceil(s)} for s in scaled)
        fitting = [grid for grid in itertools.product(*rounded) if math.prod(grid) == num_patches]
        if fitting:
            return min(fitting, key=lambda grid: sum(abs(g - s) for g, s in zip(grid, scaled, strict=True)))
    if same_length:
        return shape.grid
    if len(set(shape.grid)) == 1 and num_patches > 0:
        side = round(num_patches ** (1 / len(shape.grid)))
        if side ** len(shape.grid) == num_patches:
            return (side,) * len(shape.grid)
    raise ValueError(
        f"The prompt was made for {shape.num_positions} tokens ({shape.num_extra} extra tokens and a patch grid of "
        f"{' x '.join(map(str, shape.grid))}) and cannot be fitted to {num_tokens} tokens. Use images whose patches "
        "form a grid of the same proportions, or prompt_rank=0 for sequences without a grid."
    )


def prompt_for(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    shape: BlockShape,
    image_size: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """The prompt `A B`, shaped to be added to x.

    Args:
        x: the block's input, laid out as `shape.layout` says.
        a: (L, r).
        b: (r, D).

    Returns:
        a tensor that broadcasts over the batch of x, in the dtype of x.

    Raises:
        ValueError: if the channels or the positions of x do not fit.
    """
    if x.shape[shape.channel_dim] != b.shape[1]:
        raise ValueError(
            f"The prompt was made for {b.shape[1]} channels and gets an input of shape {tuple(x.shape)} "
            f"({shape.layout}): the adapter belongs to another architecture."
        )
    if shape.layout == "tokens":
        grid = resolve_grid(x.shape[1], shape, image_size)
    else:
        grid = tuple(x.shape[2:]) if shape.layout == "channels_first" else tuple(x.shape[1:-1])
    if len(grid) != len(shape.grid):
        raise ValueError(
            f"The prompt was made for a {len(shape.grid)}-dimensional grid and gets an input of shape {tuple(x.shape)}."
        )
    prompt = interpolate_rows(a, shape.grid, grid, shape.num_extra) @ b
    if shape.layout == "channels_first":
        return prompt.T.reshape(1, b.shape[1], *grid).to(x.dtype)
    if shape.layout == "channels_last":
        return prompt.reshape(1, *grid, b.shape[1]).to(x.dtype)
    return prompt.unsqueeze(0).to(x.dtype)
