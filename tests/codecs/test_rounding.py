"""Stochastic rounding: unbiased over seeds, reproducible, and without a trace in the random state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_s2a.codecs.affine import GroupAffineCodec
from peft_s2a.codecs.channel import ChannelAffineCodec
from peft_s2a.codecs.probability import SqrtProbabilityCodec
from peft_s2a.codecs.rounding import round_codes, uniform


@pytest.fixture(autouse=True)
def _restored_seed() -> Any:
    with torch.random.fork_rng(devices=[]):
        yield


def affine(x: Tensor, num_bits: int = 2) -> Tensor:
    codec = GroupAffineCodec(num_bits, rounding="stochastic")
    return codec.decode(codec.encode(x), x.numel(), torch.float32)


def channel(x: Tensor, num_bits: int = 2) -> Tensor:
    heads = x.view(2, 2, 16, 32)
    codec = ChannelAffineCodec(num_bits, rounding="stochastic")
    return codec.decode(codec.encode(heads), (2, 2, 16, 32), torch.float32).reshape(-1)


def test_uniform_numbers_look_random() -> None:
    for numbers in (torch.zeros(64, 1024), torch.rand(64, 1024, generator=torch.Generator().manual_seed(0))):
        u = uniform(numbers)
        assert ((u >= 0) & (u < 1)).all()
        rows = u if numbers.any() else u[:1]  # rows of equal numbers are equal
        assert abs(float(rows.mean()) - 0.5) < 5 * (12 * rows.numel()) ** -0.5
        counts = torch.histc(rows, 16, 0, 1) / rows.numel()
        assert (counts - 1 / 16).abs().max() < 5 * (rows.numel() * 16) ** -0.5
        neighbours = torch.corrcoef(torch.stack([rows[:, :-1].flatten(), rows[:, 1:].flatten()]))[0, 1]
        assert abs(float(neighbours)) < 5 * rows.numel() ** -0.5


def test_whole_numbers_stay() -> None:
    x = torch.arange(16.0).repeat(100, 1)
    assert torch.equal(round_codes(x.clone(), "stochastic"), x)


@pytest.mark.parametrize("function", [affine, channel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_over_seeds_is_the_number(function: Any, dtype: torch.dtype) -> None:
    x = torch.randn(2048, generator=torch.Generator().manual_seed(0)).to(dtype)
    decoded = []
    for seed in range(400):
        torch.manual_seed(seed)
        decoded.append(function(x))
    mean, deviation = torch.stack(decoded).mean(0), torch.stack(decoded).std(0)
    error, scale = mean - x.float(), 2 * deviation.max()  # a fraction of a half has the deviation of half a scale
    assert scale > 0.5
    assert error.abs().max() < 5 * scale / 2 / 400**0.5
    assert abs(float(error.mean())) < 5 * scale / 2 / (400 * 2048) ** 0.5


def test_probabilities_have_the_mean_of_their_roots() -> None:
    rows = torch.softmax(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), -1)
    codec = SqrtProbabilityCodec(6, "stochastic")
    decoded = []
    for seed in range(200):
        torch.manual_seed(seed)
        decoded.append(codec.decode(codec.encode(rows), 16, torch.float32))
    torch.testing.assert_close(torch.stack(decoded).mean(0), rows, rtol=0.03, atol=2e-3)
    assert torch.stack(decoded).std(0).max() > 1e-3


@pytest.mark.parametrize("function", [affine, channel])
def test_the_seed_alone_decides(function: Any) -> None:
    x = torch.randn(2048, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = function(x)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    torch.rand(10)
    assert torch.equal(function(x), first)
    torch.manual_seed(4)
    assert not torch.equal(function(x), first)


def test_pieces_are_rounded_like_the_whole() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([affine(x[:1024]), affine(x[1024:])]), affine(x))


@pytest.mark.parametrize("num_bits", [1, 2, 4, 8])
def test_the_error_is_at_most_a_scale(num_bits: int) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    x[:64] = 3.0
    x[64:128] = 0.0
    codec = GroupAffineCodec(num_bits, rounding="stochastic")
    kept = codec.encode(x)
    scale = kept[1].float().repeat_interleave(64, 1).view(-1)
    assert ((codec.decode(kept, 4096, torch.float32) - x).abs() <= scale * 1.001 + 1e-6).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_not_finite_and_empty(poison: float) -> None:
    x = torch.zeros(256)
    x[70] = poison
    decoded = affine(x)
    assert decoded[64:128].isnan().all()
    assert decoded[:64].isfinite().all()
    assert affine(torch.zeros(0)).shape == (0,)
