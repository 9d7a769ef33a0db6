"""Stand-ins decode what they say, in as many bits as they say; relative codes keep their bound."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_s2a.codecs.affine import GroupAffineCodec
from peft_s2a.codecs.base import Codec
from peft_s2a.codecs.relative import MAX_RELATIVE_ERROR, RelativeCodec, SignedAffineCodec
from peft_s2a.codecs.stand_in import BoolCodec, IndexCodec, ScaledMaskCodec, ShapeCodec, SignCodec

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def round_trip(codec: Codec, values: Tensor) -> Tensor:
    kept = codec.encode(values)
    decoded = codec.decode(kept, values.numel(), values.dtype)
    assert decoded.dtype == values.dtype
    assert decoded.shape == values.shape
    assert all(t.untyped_storage().data_ptr() != values.untyped_storage().data_ptr() or not t.numel() for t in kept)
    return decoded


def kept_bits(codec: Codec, values: Tensor) -> int:
    return 8 * sum(t.nbytes for t in codec.encode(values))


@pytest.mark.parametrize("numel", [0, 1, 7, 1024, 1025])
@pytest.mark.parametrize("dtype", FLOATS)
def test_signs(numel: int, dtype: torch.dtype) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    special = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-7, -1e-7], dtype=dtype)
    values[: len(special)] = special[:numel]
    decoded = round_trip(SignCodec(), values)
    assert torch.equal(decoded.isnan(), values.isnan())
    assert torch.equal(decoded.nan_to_num(9), torch.sign(values).where(~values.isnan(), torch.tensor(9.0).to(dtype)))
    assert kept_bits(SignCodec(), values) == math.ceil(numel / 1024) * 2048


def test_shapes_take_nothing() -> None:
    values = torch.randn(5000)
    assert kept_bits(ShapeCodec(), values) == 0
    decoded = round_trip(ShapeCodec(), values)
    assert decoded.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("numel", [0, 1, 1000, 1024, 3000])
def test_masks(numel: int) -> None:
    mask = torch.rand(numel, generator=torch.Generator().manual_seed(0)) > 0.3
    assert torch.equal(round_trip(BoolCodec(), mask), mask)
    for dtype in FLOATS:
        noise = mask.to(dtype).div_(0.7)
        assert torch.equal(round_trip(ScaledMaskCodec(), noise), noise)
        rows = math.ceil(numel / 1024)
        assert kept_bits(ScaledMaskCodec(), noise) == rows * (1024 + 8 * noise.element_size())


@pytest.mark.parametrize(("bound", "bits"), [(0, 8), (127, 8), (128, 16), (32767, 16), (32768, 32), (2**40, 64)])
def test_indices(bound: int, bits: int) -> None:
    values = torch.tensor([0, bound, -1, bound // 2])
    codec = IndexCodec(bound)
    assert torch.equal(round_trip(codec, values), values)
    assert codec.num_bits == bits
    assert kept_bits(codec, values) == 4 * bits


@given(values=st.lists(st.floats(width=32), max_size=50))
def test_relative_error(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    decoded = round_trip(RelativeCodec(), x)
    normal = x.isfinite() & (x.abs() >= torch.finfo(torch.float32).tiny) & (x.abs() < 3.3e38)
    assert ((decoded - x).abs() <= x.abs() * MAX_RELATIVE_ERROR)[normal].all()
    same = ~x.isfinite() | (x == 0)
    torch.testing.assert_close(decoded[same], x[same], rtol=0, atol=0, equal_nan=True)
    assert kept_bits(RelativeCodec(), x) == 16 * x.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exact(dtype: torch.dtype) -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(round_trip(RelativeCodec(), x), x)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("num_bits", [2, 8])
def test_signed_codes(dtype: torch.dtype, num_bits: int) -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[::50] *= 1e-3
    affine = GroupAffineCodec(num_bits)
    plain, signed = round_trip(affine, x), round_trip(SignedAffineCodec(affine), x)
    assert torch.equal(signed > 0, x > 0)
    assert ((signed - x).abs() <= (plain - x).abs() + 1e-6).all()
    some: Any = torch.tensor([math.nan])
    assert round_trip(SignedAffineCodec(affine), some).isnan().all()
