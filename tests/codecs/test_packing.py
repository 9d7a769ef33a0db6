"""Bits to bytes and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_s2a.codecs.packing import _unpack_floats, pack, packed_width, unpack
from peft_s2a.settings import BIT_LEVELS


def random_codes(rows: int, width: int, num_bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**num_bits, (rows, width), dtype=torch.uint8, generator=generator)


@given(
    rows=st.integers(0, 4), bytes_wide=st.integers(0, 9), num_bits=st.sampled_from(BIT_LEVELS), seed=st.integers(0, 99)
)
def test_unpack_inverts_pack(rows: int, bytes_wide: int, num_bits: int, seed: int) -> None:
    codes = random_codes(rows, 8 * bytes_wide, num_bits, seed)
    packed = pack(codes, num_bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(8 * bytes_wide, num_bits)) == (rows, bytes_wide * num_bits)
    assert torch.equal(unpack(packed, num_bits, 8 * bytes_wide), codes)


@pytest.mark.parametrize("group", [1, 8, 24])
@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_float_arithmetic_unpacks_the_same(num_bits: int, group: int) -> None:
    codes = random_codes(3, 192, num_bits)
    found = _unpack_floats(pack(codes, num_bits), num_bits, 192, group)
    assert found.dtype == torch.float32
    assert torch.equal(found.view(3, 192), codes.float())


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_every_code_survives_in_every_position(num_bits: int) -> None:
    codes = torch.arange(2**num_bits, dtype=torch.uint8).view(-1, 1).expand(-1, 16).contiguous()
    assert torch.equal(unpack(pack(codes, num_bits), num_bits, 16), codes)


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_rows_are_independent(num_bits: int) -> None:
    codes = random_codes(5, 32, num_bits)
    assert torch.equal(pack(codes, num_bits)[2:4], pack(codes[2:4], num_bits))


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_what_is_packed_does_not_alias_the_codes(num_bits: int) -> None:
    codes = random_codes(2, 16, num_bits)
    packed = pack(codes, num_bits)
    before = packed.clone()
    codes.zero_()
    assert torch.equal(packed, before)
