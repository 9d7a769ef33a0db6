"""How a block's input is laid out: tokens, channels-last maps or channels-first maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Layout = Literal["tokens", "channels_last", "channels_first"]

LAYOUTS: tuple[Layout, ...] = ("tokens", "channels_last", "channels_first")


@dataclass(frozen=True)
class BlockShape:
    """Shape of the feature that enters (and leaves) a block, without the batch.

    Args:
        layout: `"tokens"` is (B, L, D), `"channels_last"` is (B, *grid, D), `"channels_first"` is (B, D, *grid).
        channels: D, the channels of the input.
        out_channels: channels of the output.
        grid: sizes of the patch grid (one to three numbers); the shape was found at this grid.
        num_extra: tokens in front of the patch tokens (class, distillation, register tokens).
        image_size: sizes of the image the grid was found for.
    """

    layout: Layout
    channels: int
    out_channels: int
    grid: tuple[int, ...]
    num_extra: int = 0
    image_size: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} is not one of {', '.join(LAYOUTS)}.")
        if not 1 <= len(self.grid) <= 3 or min(self.grid) < 1:
            raise ValueError(f"grid={self.grid} must be one to three positive sizes.")

    @property
    def num_positions(self) -> int:
        """L, the rows of the prompt: extra tokens and the positions of the grid."""
        return self.num_extra + math.prod(self.grid)

    @property
    def channel_dim(self) -> int:
        """Dimension of the channels in the batched feature."""
        return 1 if self.layout == "channels_first" else -1

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, as saved in `adapter_config.json`."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockShape:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for missing or unknown keys.
        """
        try:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**fields)
        except TypeError as error:
            raise ValueError(
                f"block_shapes has the entry {dict(values)!r}; an entry needs layout, channels, out_channels and "
                "grid, and may have num_extra and image_size."
            ) from error
