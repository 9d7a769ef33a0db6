"""What is trained: the bias delta, the low-rank prompt and the lite side branch."""

from .bias import (
    BiasSlot,
    adds_bias_last,
    bias_slots,
    call_with_bias_deltas,
    can_stand_in,
    find_channel_dim,
    input_width,
    is_batch_norm,
    is_supported,
    stand_in,
)
from .layout import BlockShape, Layout
from .prompt import interpolate_rows, prompt_for, resolve_grid
from .side import SideWeights, add_linear, add_side, channel_average_pool, pool_for_side, pooled_width

__all__ = [
    "BiasSlot",
    "BlockShape",
    "Layout",
    "SideWeights",
    "add_linear",
    "add_side",
    "adds_bias_last",
    "bias_slots",
    "call_with_bias_deltas",
    "can_stand_in",
    "channel_average_pool",
    "find_channel_dim",
    "input_width",
    "interpolate_rows",
    "is_batch_norm",
    "is_supported",
    "pool_for_side",
    "pooled_width",
    "prompt_for",
    "resolve_grid",
    "stand_in",
]
