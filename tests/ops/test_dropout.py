"""Dropout: with the same seed, values and gradients are torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_s2a.ops.dropout import dropout


def seeded(call: Any) -> Any:
    def run(x: Tensor) -> Tensor:
        torch.manual_seed(7)
        return call(x)

    return run


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_bit_identical_to_torch(p: float, dtype: torch.dtype, leaf: Any, same_as_torch: Any) -> None:
    x = leaf(7, 300, dtype=dtype)
    same_as_torch(seeded(lambda x: dropout(x, p)), seeded(lambda x: F.dropout(x, p)), x)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "channels_last", "empty", "single", "expanded"])
def test_layouts(layout: str, leaf: Any, same_as_torch: Any) -> None:
    x = leaf(2, 6, 8, 10)
    change = {
        "transposed": lambda x: x.transpose(0, 1),
        "sliced": lambda x: x[..., ::2],
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "empty": lambda x: x[:0],
        "single": lambda x: x[0, 0, 0, 0],
        "expanded": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    }[layout]
    same_as_torch(seeded(lambda x: dropout(change(x), 0.3)), seeded(lambda x: F.dropout(change(x), 0.3)), x)


def test_pieces_and_numbers_that_are_not_finite(leaf: Any, same_as_torch: Any, small_chunks: None) -> None:
    x = leaf(5, 700).detach()
    x[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    same_as_torch(seeded(lambda x: dropout(x, 0.4)), seeded(lambda x: F.dropout(x, 0.4)), x.requires_grad_())


def test_gradcheck(leaf: Any) -> None:
    assert torch.autograd.gradcheck(seeded(lambda x: dropout(x, 0.3)), leaf(3, 9, dtype=torch.double))


def test_one_bit_per_element(leaf: Any, kept_bytes: Any) -> None:
    x = leaf(3, 1024)
    assert kept_bytes(lambda: dropout(x, 0.5)) == 3 * 1024 // 8


def test_draws_as_many_numbers_as_torch(leaf: Any) -> None:
    x = leaf(3, 100)
    seeded(lambda x: dropout(x, 0.5))(x)
    after_ours = torch.rand(1)
    seeded(lambda x: F.dropout(x, 0.5))(x)
    assert torch.equal(after_ours, torch.rand(1))


def test_double_backward(leaf: Any, refuses_double_backward: Any) -> None:
    refuses_double_backward(lambda x: dropout(x, 0.5), leaf(4, 256))
