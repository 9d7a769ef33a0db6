"""Group-wise affine codes: the error is at most half a scale, and what is not finite never becomes finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from peft_s2a.codecs.affine import ROW, GroupAffineCodec, affine_range
from peft_s2a.codecs.chunked import decode_range
from peft_s2a.settings import BIT_LEVELS

TINY = 1e-36
"""The reciprocal of a scale near the smallest normal numbers overflows: groups this narrow have one value."""

BIG = 2.0**100

bits = st.sampled_from(BIT_LEVELS)


def assert_within_half_a_scale(codec: GroupAffineCodec, values: Tensor) -> None:
    kept = codec.encode(values)
    decoded = codec.decode(kept, values.numel(), torch.float32)
    assert decoded.shape == values.shape
    scale = kept[1].float().view(-1, 1).expand(-1, codec.group_size).reshape(-1)[: values.numel()]
    zero_point = kept[2].float().view(-1, 1).expand(-1, codec.group_size).reshape(-1)[: values.numel()]
    # besides the choice of the code: float32 arithmetic at the size of the numbers
    rounding = 4 * torch.finfo(torch.float32).eps * (values.abs() + zero_point.abs())
    error = (decoded - values).abs()
    assert (error <= scale / 2 + rounding + TINY).all()


@given(
    values=st.lists(st.floats(-BIG, BIG, width=32), min_size=1, max_size=200),
    num_bits=bits,
    group_size=st.sampled_from([32, 64, 128]),
)
@example(values=[0.0], num_bits=4, group_size=64)
@example(values=[BIG, -BIG], num_bits=1, group_size=64)
@example(values=[1e-42, 0.0, -1e-44], num_bits=8, group_size=64)
@example(values=[3e38], num_bits=4, group_size=64)
def test_error_of_any_numbers(values: list[float], num_bits: int, group_size: int) -> None:
    assert_within_half_a_scale(GroupAffineCodec(num_bits, group_size), torch.tensor(values))


@given(
    numel=st.sampled_from([1, 7, 63, 64, 65, 1023, 1024, 1025, 2500]),
    num_bits=bits,
    centre=st.floats(-1e4, 1e4),
    log_spread=st.integers(-6, 6),
    seed=st.integers(0, 99),
)
def test_error_of_normal_numbers(numel: int, num_bits: int, centre: float, log_spread: int, seed: int) -> None:
    noise = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    assert_within_half_a_scale(GroupAffineCodec(num_bits), centre + noise * 10.0**log_spread)


@given(low=st.floats(-BIG, BIG, width=32), span=st.floats(0, BIG, width=32), num_bits=bits)
def test_range_covers_the_group(low: float, span: float, num_bits: int) -> None:
    low_, high = torch.tensor(low), torch.tensor(low) + torch.tensor(span)
    scale, zero_point = affine_range(low_, high, num_bits)
    assert scale.dtype == zero_point.dtype == torch.bfloat16
    assert zero_point.double() <= low_.double() + TINY
    reach = zero_point.double() + scale.double() * (2**num_bits - 1)
    assert reach * (1 + math.copysign(1e-6, reach)) >= high.double() - TINY


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_scale_is_not_wasteful(num_bits: int) -> None:
    values = torch.randn(ROW, generator=torch.Generator().manual_seed(0))
    _, scale, _ = GroupAffineCodec(num_bits).encode(values)
    groups = values.view(-1, 64)
    least = (groups.amax(1) - groups.amin(1)) / (2**num_bits - 1)
    assert (scale.float().view(-1) <= least * 1.03).all()


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
@pytest.mark.parametrize("constant", [0.0, 1.0, -1.0, 0.3, -1000.3, 1e30, 1e-30])
def test_constant_groups(num_bits: int, constant: float) -> None:
    codec = GroupAffineCodec(num_bits)
    values = torch.full((128,), constant)
    decoded = codec.decode(codec.encode(values), 128, torch.float32)
    # the zero point is a bfloat16 at most two steps below; the codes take up the rest
    torch.testing.assert_close(decoded, values, rtol=2.0**-6 / (2**num_bits - 1), atol=0)


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_group_that_is_not_finite_is_nan_and_no_other(num_bits: int, poison: float, dtype: torch.dtype) -> None:
    codec = GroupAffineCodec(num_bits)
    values = torch.randn(300, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[70] = poison
    decoded = codec.decode(codec.encode(values), 300, dtype)
    assert decoded[64:128].isnan().all()
    assert torch.cat([decoded[:64], decoded[128:]]).isfinite().all()


def test_opposite_infinities_are_nan() -> None:
    values = torch.tensor([float("inf"), -float("inf")])
    codec = GroupAffineCodec(4)
    assert codec.decode(codec.encode(values), 2, torch.float32).isnan().all()


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
@pytest.mark.parametrize("numel", [0, 1, 64, 1024, 1025, 5000])
@pytest.mark.parametrize("group_size", [32, 64])
def test_bytes_kept(num_bits: int, numel: int, group_size: int) -> None:
    kept = GroupAffineCodec(num_bits, group_size).encode(torch.ones(numel))
    rows = math.ceil(numel / ROW)
    bytes_kept = sum(t.numel() * t.element_size() for t in kept)
    assert bytes_kept * 8 == rows * ROW * (num_bits + 32 / group_size)
    assert all(t.shape[0] == rows for t in kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_decodes_to_the_dtype_asked_for(dtype: torch.dtype) -> None:
    codec = GroupAffineCodec(4)
    assert codec.decode(codec.encode(torch.ones(9, dtype=dtype)), 9, dtype).dtype == dtype
    assert codec.decode(codec.encode(torch.ones(0, dtype=dtype)), 0, dtype).shape == (0,)


def test_rows_decode_alone() -> None:
    codec = GroupAffineCodec(3)
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    kept = codec.encode(values)
    whole = codec.decode(kept, 3000, torch.float32)
    assert torch.equal(decode_range(codec, kept, 1024, 2048, torch.float32), whole[1024:2048])
    assert torch.equal(decode_range(codec, kept, 2048, 3000, torch.float32), whole[2048:])
