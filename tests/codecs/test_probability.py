"""Codes of the rows of a softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_s2a.codecs.probability import RowCodec, SqrtProbabilityCodec
from peft_s2a.settings import BIT_LEVELS

bits = st.sampled_from(BIT_LEVELS)


def softmax_rows(rows: int, width: int, sharpness: float, seed: int = 0) -> torch.Tensor:
    return torch.softmax(sharpness * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), -1)


@given(
    rows=st.integers(0, 4),
    width=st.integers(1, 40),
    sharpness=st.sampled_from([0.0, 1.0, 10.0, 100.0]),
    num_bits=bits,
    seed=st.integers(0, 50),
)
def test_rows_sum_to_one(rows: int, width: int, sharpness: float, num_bits: int, seed: int) -> None:
    codec = SqrtProbabilityCodec(num_bits)
    decoded = codec.decode(codec.encode(softmax_rows(rows, width, sharpness, seed)), width, torch.float32)
    assert decoded.shape == (rows, width)
    assert (decoded >= 0).all()
    torch.testing.assert_close(decoded.sum(-1), torch.ones(rows))


@given(width=st.integers(1, 64), sharpness=st.sampled_from([0.0, 1.0, 10.0]), num_bits=bits, seed=st.integers(0, 50))
def test_error_of_the_roots(width: int, sharpness: float, num_bits: int, seed: int) -> None:
    codec = SqrtProbabilityCodec(num_bits)
    rows = softmax_rows(2, width, sharpness, seed)
    kept = codec.encode(rows)
    roots = codec.decode(kept, width, torch.float64).sqrt()
    # codes before the rows are scaled to sum to one: nearest multiples of largest / levels
    step = kept[1].double() / (2**num_bits - 1)
    factor = (rows.double().sqrt() / step).round().mul(step).square().sum(-1, keepdim=True).sqrt()
    assert ((roots * factor - rows.double().sqrt()).abs() <= step * (0.5 + 1e-3)).all()


def test_error_of_many_bits_is_small() -> None:
    rows = softmax_rows(8, 64, 1.0)
    codec = SqrtProbabilityCodec(8)
    torch.testing.assert_close(codec.decode(codec.encode(rows), 64, torch.float32), rows, rtol=0.05, atol=1e-4)


def test_one_hot_rows_are_exact() -> None:
    rows = torch.eye(5)
    for num_bits in BIT_LEVELS:
        codec = SqrtProbabilityCodec(num_bits)
        assert torch.equal(codec.decode(codec.encode(rows), 5, torch.float32), rows)


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_zero_rows_stay_zero_and_nan_rows_nan(num_bits: int) -> None:
    rows = softmax_rows(4, 12, 1.0)
    rows[1] = 0
    rows[2, 5] = float("nan")
    codec = SqrtProbabilityCodec(num_bits)
    decoded = codec.decode(codec.encode(rows), 12, torch.float32)
    assert torch.equal(decoded[1], torch.zeros(12))
    assert decoded[2].isnan().all()
    assert decoded[[0, 3]].isfinite().all()


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
@pytest.mark.parametrize("width", [1, 8, 13])
def test_bytes_kept(num_bits: int, width: int) -> None:
    kept = SqrtProbabilityCodec(num_bits).encode(softmax_rows(6, width, 1.0))
    padded = width + -width % 8
    assert sum(t.numel() * t.element_size() for t in kept) == 6 * (padded * num_bits // 8 + 2)


@pytest.mark.parametrize("codec", [RowCodec(), SqrtProbabilityCodec(4)])
def test_rows_decode_alone(codec: RowCodec) -> None:
    rows = softmax_rows(6, 13, 1.0)
    kept = codec.encode(rows)
    whole = codec.decode(kept, 13, torch.float32)
    assert torch.equal(codec.decode(tuple(t[2:5] for t in kept), 13, torch.float32), whole[2:5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_decodes_to_the_dtype_asked_for(dtype: torch.dtype) -> None:
    codec = SqrtProbabilityCodec(4)
    assert codec.decode(codec.encode(softmax_rows(2, 9, 1.0).to(dtype)), 9, dtype).dtype == dtype
