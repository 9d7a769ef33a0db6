"""Flat views in the order of the memory."""

from __future__ import annotations

import itertools

import pytest
import torch

from peft_s2a.ops.memory_order import flatten, memory_permutation, unflatten


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_permuted_tensors_are_not_copied(order: tuple[int, ...]) -> None:
    base = torch.arange(24.0).view(2, 3, 4)
    x = base.permute(order)
    permutation = memory_permutation(x)
    flat = flatten(x, permutation)
    assert flat.data_ptr() == base.data_ptr()
    assert torch.equal(flat, torch.arange(24.0))
    assert torch.equal(unflatten(flat, x.shape, permutation), x)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(()),
        torch.zeros(0, 3),
        torch.zeros(3, 0).T,
        torch.arange(20.0).view(4, 5)[:, ::2],
        torch.arange(4.0).view(4, 1).expand(4, 3),
        torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    ],
    ids=lambda x: str(tuple(x.shape)),
)
def test_any_layout_survives(x: torch.Tensor) -> None:
    permutation = memory_permutation(x)
    assert torch.equal(unflatten(flatten(x, permutation), x.shape, permutation), x)


def test_another_tensor_of_the_shape_flattens_in_the_same_order() -> None:
    x = torch.randn(2, 3, 4).transpose(0, 2)
    other = torch.randn(4, 3, 2)
    permutation = memory_permutation(x)
    product = flatten(x, permutation) * flatten(other, permutation)
    assert torch.equal(unflatten(product, x.shape, permutation), x * other)
