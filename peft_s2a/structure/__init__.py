"""What is trained: the bias delta, the low-rank prompt and the lite side branch."""

from .bias import BiasSlot, bias_slots, call_with_bias_deltas, find_channel_dim, is_batch_norm, is_supported
from .layout import BlockShape, Layout
from .prompt import prompt_for, interpolate_rows, resolve_grid
from .side import SideWeights, side_for, channel_average_pool, pooled_width


__all__ = [
    "BiasSlot",
    "BlockShape",
    "Layout",
    "SideWeights",
    "prompt_for",
    "side_for",
    "bias_slots",
    "call_with_bias_deltas",
    "channel_average_pool",
    "find_channel_dim",
    "interpolate_rows",
    "is_batch_norm",
    "is_supported",
    "pooled_width",
    "resolve_grid",
]
