"""Sums and products by channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_s2a.memory.allocator import record_memory_events
from peft_s2a.ops.channels import channel_sum, times_channels

SHAPES = [(3, 5), (2, 48, 6), (2, 48, 64, 64), (1, 1, 600, 600), (2, 0, 4)]
LARGE = (2, 48, 64, 64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_sums(shape: tuple[int, ...], channels_last: bool) -> None:
    x = torch.randn(shape).to(torch.bfloat16)
    if channels_last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    found = channel_sum(x, torch.float32)
    torch.testing.assert_close(found, x.float().sum([0, *range(2, len(shape))]), rtol=1e-4, atol=1e-3)
    assert channel_sum(x, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
def test_products(shape: tuple[int, ...], dtype: torch.dtype, in_place: bool) -> None:
    x, factor = torch.randn(shape).to(dtype), torch.randn(shape[1])
    expected = (x * factor.view(-1, *[1] * (len(shape) - 2))).to(dtype)
    out = x if in_place else torch.empty_like(x)
    assert times_channels(x, factor, out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "work",
    [lambda x: channel_sum(x, torch.float32), lambda x: times_channels(x, torch.ones(LARGE[1]), x)],
)
def test_nothing_is_cast_as_a_whole(work: Callable[[Tensor], Any]) -> None:
    x = torch.randn(LARGE).to(torch.bfloat16)
    largest = max(event.bytes for event in record_memory_events(lambda: work(x), x.device))
    assert largest <= 4 * x.numel() / 1.4
