"""Codes of attention heads: one scale for each head channel over the tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_s2a.codecs.channel import ChannelAffineCodec, IdentityHeadCodec
from peft_s2a.settings import BIT_LEVELS

TINY = 1e-36


def heads_of(shape: tuple[int, int, int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 5)),
    num_bits=st.sampled_from(BIT_LEVELS),
    log_spread=st.sampled_from([-38, -20, 0, 3, 30]),
    centre=st.sampled_from([0.0, 1.0, -37.3]),
    seed=st.integers(0, 50),
)
def test_error_is_at_most_half_a_scale(
    shape: tuple[int, int, int, int], num_bits: int, log_spread: int, centre: float, seed: int
) -> None:
    heads = (heads_of(shape, seed) + centre) * 10.0**log_spread
    codec = ChannelAffineCodec(num_bits)
    kept = codec.encode(heads)
    decoded = codec.decode(kept, shape, torch.float32)
    assert decoded.shape == shape
    scale = kept[1].float().unsqueeze(2)  # (N, H, 1, D)
    rounding = 4 * torch.finfo(torch.float32).eps * (heads.abs() + kept[2].float().unsqueeze(2).abs())
    assert ((decoded - heads).abs() <= scale / 2 + rounding + TINY).all()


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_outlier_channels_keep_to_themselves(num_bits: int) -> None:
    heads = heads_of((2, 2, 20, 4))
    codec = ChannelAffineCodec(num_bits)
    quiet = codec.decode(codec.encode(heads), heads.shape, torch.float32)
    loud = heads.clone()
    loud[..., 1] *= 1e4
    decoded = codec.decode(codec.encode(loud), heads.shape, torch.float32)
    assert torch.equal(decoded[..., [0, 2, 3]], quiet[..., [0, 2, 3]])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_channel_that_is_not_finite_is_nan_and_no_other(poison: float) -> None:
    heads = heads_of((2, 2, 6, 4))
    heads[1, 0, 3, 2] = poison
    codec = ChannelAffineCodec(4)
    decoded = codec.decode(codec.encode(heads), heads.shape, torch.float32)
    nan = torch.zeros_like(heads, dtype=torch.bool)
    nan[1, 0, :, 2] = True
    assert torch.equal(decoded.isnan(), nan)
    assert decoded[~nan].isfinite().all()


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
@pytest.mark.parametrize("constant", [0.0, 2.5, -1e30])
def test_constant_channels_and_single_tokens(num_bits: int, constant: float) -> None:
    codec = ChannelAffineCodec(num_bits)
    for tokens in (1, 5):
        heads = torch.full((1, 2, tokens, 3), constant)
        decoded = codec.decode(codec.encode(heads), heads.shape, torch.float32)
        torch.testing.assert_close(decoded, heads, rtol=2.0**-6 / (2**num_bits - 1), atol=0)


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_bytes_kept(num_bits: int) -> None:
    items, num_heads, tokens, channels = shape = (3, 2, 16, 4)
    kept = ChannelAffineCodec(num_bits).encode(heads_of(shape))
    numel = items * num_heads * tokens * channels
    assert sum(t.numel() * t.element_size() for t in kept) * 8 == numel * (num_bits + 32 / tokens)
    assert all(t.shape[0] == items for t in kept)


def test_ragged_rows_are_padded_to_whole_bytes() -> None:
    packed, _, _ = ChannelAffineCodec(3).encode(heads_of((2, 1, 5, 3)))
    assert packed.shape == (2, 16 * 3 // 8)


@pytest.mark.parametrize("codec", [ChannelAffineCodec(4), ChannelAffineCodec(3), IdentityHeadCodec()])
def test_items_of_a_batch_decode_alone(codec: ChannelAffineCodec | IdentityHeadCodec) -> None:
    heads = heads_of((4, 2, 5, 3))
    kept = codec.encode(heads)
    whole = codec.decode(kept, (4, 2, 5, 3), torch.float32)
    assert torch.equal(codec.decode(tuple(t[1:3] for t in kept), (2, 2, 5, 3), torch.float32), whole[1:3])


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 2, 0, 4), (2, 0, 5, 4), (2, 2, 5, 0)])
@pytest.mark.parametrize("num_bits", [3, 4, 8])
def test_empty(shape: tuple[int, int, int, int], num_bits: int) -> None:
    codec = ChannelAffineCodec(num_bits)
    assert codec.decode(codec.encode(torch.zeros(shape)), shape, torch.float32).shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_order_in_memory_does_not_matter(dtype: torch.dtype) -> None:
    codec = ChannelAffineCodec(4)
    heads = heads_of((2, 3, 5, 4)).to(dtype)
    strided = heads.transpose(1, 2).contiguous().transpose(1, 2)
    decoded = codec.decode(codec.encode(strided), heads.shape, dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, codec.decode(codec.encode(heads), heads.shape, dtype))
