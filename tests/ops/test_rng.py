"""The random state is replayed, and put back."""

from __future__ import annotations

import torch

from peft_s2a.ops.rng import replayed_rng, rng_state

CPU = torch.device("cpu")


def test_replays_the_draws_and_returns_the_generator() -> None:
    torch.manual_seed(0)
    state = rng_state(CPU)
    first = torch.rand(5)
    expected_next = torch.rand(5)
    torch.set_rng_state(state)
    torch.rand(5)
    with replayed_rng(state, CPU):
        assert torch.equal(torch.rand(5), first)
    assert torch.equal(torch.rand(5), expected_next)


def test_none_does_nothing() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with replayed_rng(None, CPU):
        assert torch.equal(torch.rand(3), expected)
