"""Linear layers with a trained weight."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from peft_s2a.codecs.affine import GroupAffineCodec
from peft_s2a.codecs.base import IdentityCodec
from peft_s2a.ops.linear import linear
from peft_s2a.settings import BIT_LEVELS

IDENTITY = IdentityCodec()
NEEDS = [n for n in itertools.product([True, False], repeat=3) if any(n)]


@pytest.mark.parametrize("needs", NEEDS)
def test_gradcheck(needs: tuple[bool, bool, bool], leaf: Any) -> None:
    x = leaf(2, 3, 4, dtype=torch.double, needs=needs[0])
    weight = leaf(5, 4, dtype=torch.double, needs=needs[1])
    bias = leaf(5, dtype=torch.double, needs=needs[2])
    assert torch.autograd.gradcheck(lambda *a: linear(*a, IDENTITY), (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced", "single_row", "empty"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_dtypes_and_layouts(
    dtype: torch.dtype, layout: str, has_bias: bool, leaf: Any, same_as_torch: Any, small_chunks: None
) -> None:
    change = {
        "contiguous": lambda x: x,
        "permuted": lambda x: x.permute(1, 0, 2),
        "sliced": lambda x: x[:, ::2],
        "single_row": lambda x: x[0, 0],
        "empty": lambda x: x[:0],
    }[layout]
    x, weight = leaf(3, 6, 40, dtype=dtype), leaf(8, 40, dtype=dtype)
    bias = leaf(8, dtype=dtype) if has_bias else None
    tolerance = {torch.float16: 3e-2, torch.bfloat16: 2e-1, torch.float32: 1e-5}[dtype]
    same_as_torch(
        lambda x, w, b: linear(change(x), w, b, IDENTITY),
        lambda x, w, b: F.linear(change(x), w, b),
        x,
        weight,
        bias,
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_only_the_weight_gradient_has_an_error(num_bits: int, leaf: Any) -> None:
    x, weight, bias = leaf(4, 8, 32), leaf(6, 32), leaf(6)
    grad = leaf(4, 8, 6, needs=False)
    codec = GroupAffineCodec(num_bits)
    exact = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), grad)
    coded = torch.autograd.grad(linear(x, weight, bias, codec), (x, weight, bias), grad)
    torch.testing.assert_close(coded[0], exact[0])
    torch.testing.assert_close(coded[2], exact[2])
    delta = codec.encode(x.detach().reshape(-1))[1].float().max() / 2
    bound = delta * grad.abs().sum((0, 1)).unsqueeze(1)
    assert ((coded[1] - exact[1]).abs() <= bound * (1 + 1e-4) + 1e-5).all()


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_bytes_kept(num_bits: int, leaf: Any, kept_bytes: Any) -> None:
    x, weight, bias = leaf(2, 16, 64), leaf(8, 64), leaf(8)
    codec = GroupAffineCodec(num_bits)
    expected = 2 * (1024 * num_bits // 8 + 16 * 4)
    assert kept_bytes(lambda: linear(x, weight, bias, codec), (weight,)) == expected
    assert kept_bytes(lambda: linear(x, weight.detach(), bias, codec), (weight,)) == 0


def test_nan_reaches_the_weight_gradient(leaf: Any) -> None:
    x, weight = leaf(2, 4, 64).detach(), leaf(8, 64)
    x[1, 2, 3] = float("inf")
    (dw,) = torch.autograd.grad(linear(x, weight, None, GroupAffineCodec(4)).sum(), weight)
    (expected,) = torch.autograd.grad(F.linear(x, weight).sum(), weight)
    assert not dw[~expected.isfinite()].isfinite().any()


def test_double_backward(leaf: Any, refuses_double_backward: Any) -> None:
    weight = leaf(5, 8)
    refuses_double_backward(lambda x: linear(x, weight, None, IDENTITY), leaf(2, 4, 8))


def test_the_output_may_be_added_to_in_place(leaf: Any) -> None:
    x, weight, bias = leaf(2, 3, 64), leaf(5, 64), leaf(5)
    output = linear(x, weight, bias, GroupAffineCodec(8, 64))
    assert output._base is None  # torch's own product of three dimensions is a view
    output.add_(torch.ones(2, 3, 5))
    output.sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((5,), 6.0))
