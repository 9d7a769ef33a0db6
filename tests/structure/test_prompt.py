"""The low-rank prompt."""

from __future__ import annotations

import pytest
import torch

from peft_s2a.structure import BlockShape, interpolate_rows, prompt_for, resolve_grid

SHAPE = BlockShape("tokens", 6, 6, (4, 4), 1, (32, 32))


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        (SHAPE, (2, 17, 6)),
        (BlockShape("channels_last", 6, 6, (4, 2)), (2, 4, 2, 6)),
        (BlockShape("channels_first", 6, 6, (4, 2)), (2, 6, 4, 2)),
        (BlockShape("channels_first", 6, 6, (2, 4, 2)), (2, 6, 2, 4, 2)),
    ],
)
def test_prompt_is_a_times_b(shape, size):
    a, b = torch.randn(shape.num_positions, 3), torch.randn(3, 6)
    x = torch.randn(size)
    prompt = prompt_for(x, a, b, shape)
    rows = (a @ b).reshape(1, *([shape.num_positions] if shape.layout == "tokens" else shape.grid), 6)
    expected = rows.movedim(-1, 1) if shape.layout == "channels_first" else rows
    torch.testing.assert_close(prompt, expected)
    assert (x + prompt).shape == x.shape


def test_gradients_in_double_precision():
    a = torch.randn(17, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    for tokens in (17, 26):
        x = torch.randn(2, tokens, 6, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda a, b, x=x: x + prompt_for(x, a, b, SHAPE), (a, b))


def test_nothing_of_the_input_is_kept():
    a, b = torch.randn(17, 3, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        x = torch.randn(64, 17, 6, requires_grad=True)
        x + prompt_for(x, a, b, SHAPE)
    assert max(shape.numel() for shape in kept) == 17 * 3


def test_interpolation_keeps_extra_rows_and_constants():
    rows = torch.cat([torch.full((1, 2), 5.0), torch.full((16, 2), 3.0)])
    new = interpolate_rows(rows, (4, 4), (6, 5), 1)
    assert new.shape == (31, 2)
    torch.testing.assert_close(new[0], torch.full((2,), 5.0))
    torch.testing.assert_close(new[1:], torch.full((30, 2), 3.0))


def test_interpolation_goes_along_the_grid():
    ramp = torch.arange(4.0).repeat_interleave(2).unsqueeze(1)  # grows with the first grid dimension only
    new = interpolate_rows(ramp, (4, 2), (8, 2)).reshape(8, 2)
    torch.testing.assert_close(new[:, 0], new[:, 1])
    assert (new[1:, 0] >= new[:-1, 0]).all()


@pytest.mark.parametrize(
    ("tokens", "image", "grid"),
    [
        (17, None, (4, 4)),
        (17, (32, 32), (4, 4)),
        (17, (64, 16), (8, 2)),
        (26, None, (5, 5)),
        (25, (32, 48), (4, 6)),
        (25, (48, 32), (6, 4)),
    ],
)
def test_grid_of_another_image(tokens, image, grid):
    assert resolve_grid(tokens, SHAPE, image) == grid


def test_saved_grid_need_not_be_square():
    shape = BlockShape("tokens", 6, 6, (8, 2), 0, (64, 16))
    assert resolve_grid(16, shape) == (8, 2)
    assert resolve_grid(16, shape, (32, 32)) == (4, 4)


@pytest.mark.parametrize("tokens", [24, 1, 0])
def test_tokens_without_a_grid(tokens):
    with pytest.raises(ValueError, match="prompt_rank=0"):
        resolve_grid(tokens, SHAPE)


def test_other_channels():
    with pytest.raises(ValueError, match="another architecture"):
        prompt_for(torch.zeros(1, 17, 5), torch.zeros(17, 2), torch.zeros(2, 6), SHAPE)


def test_shape_entries():
    assert BlockShape.from_dict(SHAPE.to_dict()) == SHAPE
    with pytest.raises(ValueError, match="an entry needs layout"):
        BlockShape.from_dict({"layout": "tokens"})
    with pytest.raises(ValueError, match="layout="):
        BlockShape("rows", 1, 1, (1,))
    with pytest.raises(ValueError, match="grid="):
        BlockShape("tokens", 1, 1, ())
