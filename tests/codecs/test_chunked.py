"""Encoding and decoding in pieces gives what encoding and decoding at once gives."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_s2a.codecs import chunked
from peft_s2a.codecs.affine import GroupAffineCodec
from peft_s2a.codecs.base import Codec, IdentityCodec
from peft_s2a.codecs.chunked import chunk_bounds, decode_range, encode_chunked
from peft_s2a.codecs.levels import DerivativeCodec, ExactDerivativeCodec
from peft_s2a.ops.derivatives import Gelu

CPU = torch.device("cpu")
CODECS: list[Codec] = [
    IdentityCodec(),
    GroupAffineCodec(4),
    GroupAffineCodec(3),
    DerivativeCodec(Gelu(), 4),
    DerivativeCodec(Gelu(), 1),
    ExactDerivativeCodec(Gelu()),
]


@given(numel=st.integers(0, 2_000_000), units=st.lists(st.integers(1, 3000), min_size=1, max_size=2))
def test_pieces_cover_the_range_and_start_at_units(numel: int, units: list[int]) -> None:
    bounds = list(chunk_bounds(numel, CPU, *units))
    ends = [0, *(stop for _, stop in bounds)]
    assert [start for start, _ in bounds] == ends[:-1]
    assert ends[-1] == numel
    assert all(start % unit == 0 for start, _ in bounds for unit in units)
    assert all(stop > start for start, stop in bounds)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 1024, 2048, 5000])
@pytest.mark.parametrize("unit", [1, 96])
def test_in_pieces_and_at_once(codec: Codec, numel: int, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    whole = codec.encode(values)
    decoded = codec.decode(whole, numel, torch.float32)
    monkeypatch.setattr(chunked, "CPU_CHUNK", 1024)
    calls: list[tuple[int, int]] = []

    def piece(start: int, stop: int) -> torch.Tensor:
        calls.append((start, stop))
        return values[start:stop]

    kept = encode_chunked(codec, numel, CPU, piece, unit)
    if numel == 5000 and unit == 1:
        assert len(calls) == 5
    assert len(kept) == len(whole)
    for part, expected in zip(kept, whole, strict=True):
        assert torch.equal(part, expected)
    for start, stop in chunk_bounds(numel, CPU, codec.unit):
        assert torch.equal(decode_range(codec, kept, start, stop, torch.float32), decoded[start:stop])


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_codecs_are_hashable(codec: Codec) -> None:
    assert isinstance(codec, Hashable)
    assert hash(codec) == hash(codec)
