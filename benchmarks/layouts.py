"""Ways to lay out the scales of q, k and v, as decoded values and the bits they take.

A coder takes a tensor `(N, H, L, D)` (items, heads, tokens, head channels) and a number of bits, and gives back the
tensor as backward would see it and the bits kept per element. Scales, zero points, means and deviations are bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from peft_s2a.codecs.affine import affine_range, dequantize, inverse_scale, quantize

Coder = Callable[[Tensor, int], tuple[Tensor, float]]
Range = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
"""Low and high end of `(…, G)` groups along a dimension for a number of bits."""


def identity(x: Tensor, bits: int) -> tuple[Tensor, float]:
    """Keeps the tensor itself."""
    return x, 8.0 * x.element_size()


def min_max(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """The whole range."""
    low, high = torch.aminmax(x, dim=dim, keepdim=True)
    return low, high


def percentile(share: float) -> Range:
    """The range without the lowest and the highest `share` of the values."""

    def limits(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
        ends = torch.quantile(x, torch.tensor([share, 1 - share]), dim=dim, keepdim=True)
        return ends[0], ends[1]

    return limits


def shrunk(factor: float) -> Range:
    """The whole range, shrunk around its centre."""

    def limits(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(x, dim=dim, keepdim=True)
        centre, half = (low + high) / 2, (high - low) / 2 * factor
        return centre - half, centre + half

    return limits


def least_error(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """Of eleven shrunk ranges, for each group the one with the least squared error."""
    best: list[Tensor] = []
    for step in range(11):
        low, high = shrunk(1 - 0.05 * step)(x, dim, bits)
        scale, zero = affine_range(low, high, bits)
        decoded = dequantize(quantize(x, inverse_scale(scale), zero, bits), scale, zero, x.dtype)
        error = (decoded - x).square().sum(dim, keepdim=True)
        if not best:
            best = [error, low, high]
        else:
            better = error < best[0]
            best = [torch.where(better, new, old) for new, old in zip((error, low, high), best, strict=True)]
    return best[1], best[2]


def _affine(x: Tensor, dim: int, bits: int, limits: Range = min_max) -> tuple[Tensor, float]:
    low, high = limits(x, dim, bits)
    scale, zero = affine_range(low, high, bits)
    decoded = dequantize(quantize(x, inverse_scale(scale), zero, bits), scale, zero, x.dtype)
    return decoded, bits + 32 * scale.numel() / x.numel()


def per_token(x: Tensor, bits: int) -> tuple[Tensor, float]:
    """One scale and zero point for each token and head."""
    return _affine(x, -1, bits)


def channel_groups(size: int) -> Coder:
    """Groups of `size` neighbours along the channels of a token, of one head or of several."""

    def code(x: Tensor, bits: int) -> tuple[Tensor, float]:
        items, heads, tokens, channels = x.shape
        rows = x.transpose(1, 2).reshape(items, tokens, heads * channels // size, size)
        decoded, kept = _affine(rows, -1, bits)
        return decoded.view(items, tokens, heads, channels).transpose(1, 2), kept

    return code


def per_channel(limits: Range = min_max) -> Coder:
    """One scale and zero point for each channel of a head, over all tokens of an item."""
    return lambda x, bits: _affine(x, 2, bits, limits)


def per_channel_blocks(size: int) -> Coder:
    """One scale and zero point for each channel of a head and each block of `size` tokens."""

    def code(x: Tensor, bits: int) -> tuple[Tensor, float]:
        parts = [_affine(part, 2, bits) for part in x.split(size, dim=2)]
        kept = sum(bits * part.numel() for part, bits in parts) / x.numel()
        return torch.cat([part for part, _ in parts], dim=2), kept

    return code


def per_channel_of_image(images: int, coder: Coder) -> Coder:
    """`coder` with all windows of an image in a row, as if they were one long item."""

    def code(x: Tensor, bits: int) -> tuple[Tensor, float]:
        items, heads, tokens, channels = x.shape
        windows = items // images
        long = x.view(images, windows, heads, tokens, channels).transpose(1, 2).flatten(2, 3)
        decoded, kept = coder(long, bits)
        return decoded.unflatten(2, (windows, tokens)).transpose(1, 2).reshape(x.shape), kept

    return code


def mean_removed(coder: Coder, keep_mean: bool = True) -> Coder:
    """The mean over the tokens is taken out first; for k it need not be kept, as softmax does not see it."""

    def code(x: Tensor, bits: int) -> tuple[Tensor, float]:
        mean = x.mean(2, keepdim=True).bfloat16().to(x.dtype)
        decoded, kept = coder(x - mean, bits)
        return (decoded + mean if keep_mean else decoded), kept + (16 / x.shape[2] if keep_mean else 0)

    return code


@cache
def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / math.sqrt(size)


def rotated(coder: Coder) -> Coder:
    """A Hadamard rotation of the head channels (a power of two) before, and back after."""

    def code(x: Tensor, bits: int) -> tuple[Tensor, float]:
        decoded, kept = coder(x @ _hadamard(x.shape[-1]), bits)
        return decoded @ _hadamard(x.shape[-1]).T, kept

    return code


def channel_then_token(x: Tensor, bits: int) -> tuple[Tensor, float]:
    """Mean and deviation of each channel taken out, then one scale and zero point for each token and head."""
    mean = x.mean(2, keepdim=True).bfloat16().to(x.dtype)
    deviation = x.std(2, keepdim=True).clamp_min(1e-12).bfloat16().to(x.dtype)
    decoded, kept = per_token((x - mean) / deviation, bits)
    return decoded * deviation + mean, kept + 32 / x.shape[2]


@cache
def normal_levels(bits: int) -> Tensor:
    """The levels with the least squared error for a normal of deviation 1 (Lloyd and Max)."""
    points = torch.linspace(-6, 6, 20001, dtype=torch.double)
    density = torch.exp(-points.square() / 2)
    levels = torch.linspace(-2.5, 2.5, 2**bits, dtype=torch.double)
    for _ in range(3000):
        nearest = torch.bucketize(points, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add_(0, nearest, density)
        levels = torch.zeros_like(levels).index_add_(0, nearest, density * points) / mass
    return levels.float()


def per_channel_normal(x: Tensor, bits: int) -> tuple[Tensor, float]:
    """Mean and deviation of each channel over the tokens, and the best levels for a normal distribution."""
    mean = x.mean(2, keepdim=True).bfloat16().to(x.dtype)
    deviation = x.std(2, keepdim=True).clamp_min(1e-12).bfloat16().to(x.dtype)
    levels = normal_levels(bits)
    codes = torch.bucketize(((x - mean) / deviation).contiguous(), (levels[1:] + levels[:-1]) / 2)
    return levels[codes] * deviation + mean, bits + 32 / x.shape[2]


def apart(coder: Coder, first: int, other: Coder | None = None) -> Coder:
    """The first tokens kept apart in 8 bits, with one scale for each token and head (or by `other`)."""

    def code(x: Tensor, bits: int) -> tuple[Tensor, float]:
        special, special_bits = per_token(x[:, :, :first], 8) if other is None else other(x[:, :, :first], 8)
        rest, rest_bits = coder(x[:, :, first:], bits)
        share = first / x.shape[2]
        return torch.cat([special, rest], dim=2), share * special_bits + (1 - share) * rest_bits

    return code


def farthest_apart(count: int) -> Coder:
    """The `count` tokens of a head that lie farthest out, wherever they are, in 8 bits; the others per channel.

    Farthest out: the largest distance of a channel from its mean over the tokens, in deviations. Their places cost
    16 bits each.
    """

    def code(x: Tensor, bits: int) -> tuple[Tensor, float]:
        tokens, channels = x.shape[2:]
        distance = (x - x.mean(2, keepdim=True)).abs() / x.std(2, keepdim=True).clamp_min(1e-12)
        places = distance.amax(-1).topk(count, dim=2).indices
        outside = torch.zeros(x.shape[:3], dtype=torch.bool).scatter_(2, places, True).unsqueeze(-1)
        low, high = x.masked_fill(outside, math.inf).amin(2, True), x.masked_fill(outside, -math.inf).amax(2, True)
        scale, zero = affine_range(low, high, bits)
        inner = dequantize(quantize(x, inverse_scale(scale), zero, bits), scale, zero, x.dtype)
        outer, outer_bits = per_token(x, 8)
        extra = count * (outer_bits * channels + 16) / (tokens * channels)
        return torch.where(outside, outer, inner), bits + 32 / tokens + extra

    return code


Layout = tuple[Coder, Coder, Coder]
"""The coders of q, k and v."""

DEFAULT = "channel"
"""The layout that the library uses."""


def layouts(special: int, images: int, windows: bool) -> dict[str, Layout]:
    """The layouts to compare.

    Args:
        special: class and register tokens, which come first.
        images: images in the batch.
        windows: whether the items of an attention are windows of an image.
    """

    def same(coder: Coder) -> Layout:
        return coder, coder, coder

    channel = per_channel()
    found = {
        "identity": same(identity),
        DEFAULT: same(channel),
        "token and head": same(per_token),
        "groups of 64 channels": same(channel_groups(64)),
        "groups of 32 channels": same(channel_groups(32)),
        "token and head, mean removed from k": (per_token, mean_removed(per_token, keep_mean=False), per_token),
        "token and head, mean removed from q, k, v": (
            mean_removed(per_token),
            mean_removed(per_token, keep_mean=False),
            mean_removed(per_token),
        ),
        "token and head, Hadamard": same(rotated(per_token)),
        "token and head, mean removed, Hadamard": (
            mean_removed(rotated(per_token)),
            mean_removed(rotated(per_token), keep_mean=False),
            mean_removed(rotated(per_token)),
        ),
        "channel, Hadamard": same(rotated(channel)),
        "channel for q, k; token and head for v": (channel, channel, per_token),
        "channel, then token and head": same(channel_then_token),
        "channel, 0.5 % clipped at each end": same(per_channel(percentile(0.005))),
        "channel, range shrunk to 90 %": same(per_channel(shrunk(0.9))),
        "channel, range of least error": same(per_channel(least_error)),
        "channel, levels for a normal": same(per_channel_normal),
    }
    if not windows:
        found |= {
            "channel, 4 farthest tokens in 8 bits": same(farthest_apart(4)),
            "channel, Hadamard, 4 farthest tokens in 8 bits": same(rotated(farthest_apart(4))),
            "channel in blocks of 128, Hadamard": same(rotated(per_channel_blocks(128))),
            "channel in blocks of 64, Hadamard": same(rotated(per_channel_blocks(64))),
        }
    if special:
        found |= {
            "channel, special tokens in 8 bits": same(apart(channel, special)),
            "channel, special tokens in full": same(apart(channel, special, identity)),
            "channel, normal levels, special tokens in 8 bits": same(apart(per_channel_normal, special)),
            "channel, Hadamard, special tokens in 8 bits": same(apart(rotated(channel), special)),
            "channel in blocks of 64 tokens": same(per_channel_blocks(64)),
            "channel in blocks of 128 tokens": same(per_channel_blocks(128)),
            "channel in blocks of 64, special tokens in 8 bits": same(apart(per_channel_blocks(64), special)),
            "channel in blocks of 64, Hadamard, special tokens in 8 bits": same(
                apart(rotated(per_channel_blocks(64)), special)
            ),
        }
    if windows:

        def over_image(coder: Coder) -> Layout:
            return same(per_channel_of_image(images, coder))

        found |= {
            "channel over all windows of an image": over_image(channel),
            "channel over 2 windows": over_image(per_channel_blocks(98)),
            "channel over 4 windows": over_image(per_channel_blocks(196)),
            "channel over all windows, least error": over_image(per_channel(least_error)),
            "channel over all windows, levels for a normal": over_image(per_channel_normal),
            "channel over 4 windows, Hadamard": over_image(rotated(per_channel_blocks(196))),
            "channel over all windows, Hadamard": over_image(rotated(channel)),
        }
    return found
