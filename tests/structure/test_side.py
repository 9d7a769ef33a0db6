"""The lite side branch and channel average pooling."""

from __future__ import annotations

import math

import pytest
import torch

from peft_s2a.structure import (
    BlockShape,
    SideWeights,
    add_side,
    channel_average_pool,
    pool_for_side,
    pooled_width,
)


def weights(channels, out_channels, reduction, **options):
    d = pooled_width(channels, reduction)
    return SideWeights(
        torch.randn(d, d, **options),
        torch.randn(d, **options),
        torch.randn(out_channels, d, **options),
        torch.randn(out_channels, **options),
    )


def side_of(output, x, weights, shape, reduction):
    return add_side(output, pool_for_side(x, shape, reduction), weights, shape)


@pytest.mark.parametrize("channels", [1, 3, 8, 9, 16])
@pytest.mark.parametrize("dim", [-1, 1])
def test_pooling_is_the_mean_of_groups(channels, dim):
    x = torch.randn(2, 5, channels).movedim(-1, dim)
    pooled = channel_average_pool(x, 4, dim)
    expected = torch.stack([group.mean(dim) for group in x.split(4, dim)], dim)
    assert pooled.shape[dim] == pooled_width(channels, 4)
    torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize(
    ("layout", "size", "out"),
    [
        ("tokens", (2, 5, 10), (2, 5, 10)),
        ("tokens", (2, 16, 10), (2, 4, 20)),
        ("channels_last", (2, 4, 4, 10), (2, 4, 4, 10)),
        ("channels_first", (2, 10, 4, 4), (2, 10, 4, 4)),
        ("channels_first", (2, 10, 5, 4), (2, 20, 3, 2)),
    ],
)
def test_output_has_the_block_outputs_shape(layout, size, out):
    dim = 1 if layout == "channels_first" else -1
    shape = BlockShape(layout, 10, out[dim], (1,))
    x, output = torch.randn(size), torch.randn(out)
    assert side_of(output, x, weights(10, out[dim], 4), shape, 4).shape == output.shape


def test_layouts_agree():
    w = weights(10, 12, 4)
    x, output = torch.randn(2, 4, 4, 10), torch.randn(2, 2, 2, 12)
    last = side_of(output, x, w, BlockShape("channels_last", 10, 12, (4, 4)), 4)
    first = side_of(
        output.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), w, BlockShape("channels_first", 10, 12, (4, 4)), 4
    )
    torch.testing.assert_close(first.permute(0, 2, 3, 1), last)


def test_gradients_in_double_precision():
    options = {"dtype": torch.float64, "requires_grad": True}
    x, output = torch.randn(2, 3, 10, **options), torch.randn(2, 3, 10, dtype=torch.float64)
    shape = BlockShape("tokens", 10, 10, (3,))
    assert torch.autograd.gradcheck(
        lambda x, *w: side_of(output, x, SideWeights(*w), shape, 4), (x, *weights(10, 10, 4, **options))
    )


def test_only_narrow_features_are_kept():
    kept = []
    shape, w = BlockShape("tokens", 64, 64, (7,)), weights(64, 64, 16, requires_grad=True)
    x = torch.randn(32, 7, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        side_of(x, x, w, shape, 16)
    features = [t for t in kept if t.numel() > 64 * 4]
    assert features
    assert all(t.numel() == 32 * 7 * 4 for t in features)


def test_another_architecture():
    shape, x = BlockShape("tokens", 8, 8, (3,)), torch.zeros(1, 3, 9)
    with pytest.raises(ValueError, match="another architecture"):
        side_of(x, x, weights(8, 8, 4), shape, 4)


def test_pooling_does_not_overflow_in_float16() -> None:
    x = torch.full((1, 2, 32), 60000.0, dtype=torch.float16)
    assert torch.equal(channel_average_pool(x, 16), torch.full((1, 2, 2), 60000.0, dtype=torch.float16))


def test_pooling_casts_nothing_in_bfloat16() -> None:
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    with torch.profiler.profile(record_shapes=True) as operators:  # sees what a kernel calls
        channel_average_pool(x, 16)
    cast = [event.input_shapes[0] for event in operators.events() if event.name == "aten::_to_copy"]
    assert all(math.prod(shape) == 1 for shape in cast)
