"""Products of two activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_s2a.codecs.affine import GroupAffineCodec
from peft_s2a.codecs.base import IdentityCodec
from peft_s2a.ops.product import matmul, multiply
from peft_s2a.settings import BIT_LEVELS

IDENTITY = IdentityCodec()
NEEDS = [(True, True), (True, False), (False, True)]
MULTIPLY = [((3, 4), (3, 4)), ((3, 4), (4,)), ((3, 1), (1, 4)), ((2, 3, 4), (3, 1)), ((0, 4), (4,))]
MATMUL = [
    ((3, 4), (4, 5)),
    ((2, 3, 4), (2, 4, 5)),
    ((2, 1, 3, 4), (3, 4, 5)),
    ((2, 3, 4), (4, 5)),
    ((0, 3, 4), (0, 4, 2)),
]


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize(("left", "right"), MULTIPLY)
def test_multiply_gradcheck(left: Any, right: Any, needs: tuple[bool, bool], leaf: Any) -> None:
    a, b = leaf(*left, dtype=torch.double, needs=needs[0]), leaf(*right, dtype=torch.double, needs=needs[1])
    assert torch.autograd.gradcheck(lambda a, b: multiply(a, b, IDENTITY), (a, b))


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize(("left", "right"), MATMUL)
def test_matmul_gradcheck(left: Any, right: Any, needs: tuple[bool, bool], leaf: Any) -> None:
    a, b = leaf(*left, dtype=torch.double, needs=needs[0]), leaf(*right, dtype=torch.double, needs=needs[1])
    assert torch.autograd.gradcheck(lambda a, b: matmul(a, b, IDENTITY), (a, b))


def test_a_square(leaf: Any) -> None:
    x = leaf(3, 4, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x: multiply(x, x, IDENTITY), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "single"])
def test_dtypes_and_layouts(dtype: torch.dtype, layout: str, leaf: Any, same_as_torch: Any, small_chunks: None) -> None:
    change = {
        "contiguous": lambda x: x,
        "transposed": lambda x: x.transpose(0, 1),
        "sliced": lambda x: x[::2],
        "single": lambda x: x[:1, :1],
    }[layout]
    a, b = leaf(4, 6, 8, dtype=dtype), leaf(4, 6, 8, dtype=dtype)
    same_as_torch(lambda a, b: multiply(change(a), change(b), IDENTITY), lambda a, b: change(a) * change(b), a, b)
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 2e-1, torch.float32: 1e-5}[dtype]
    same_as_torch(
        lambda a, b: matmul(change(a), change(b).mT, IDENTITY),
        lambda a, b: change(a) @ change(b).mT,
        a,
        b,
        rtol=tolerance,
        atol=tolerance,
    )


def test_mixed_dtypes(leaf: Any) -> None:
    a, b = leaf(3, 4, dtype=torch.bfloat16), leaf(3, 4)
    grads = torch.autograd.grad(multiply(a, b, IDENTITY).sum(), (a, b))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_error_follows_from_the_codec(num_bits: int, leaf: Any) -> None:
    a, b, grad = leaf(4, 16, 16), leaf(4, 16, 16), leaf(4, 16, 16, needs=False)
    codec = GroupAffineCodec(num_bits)

    def delta(x: torch.Tensor) -> torch.Tensor:
        return codec.encode(x.detach().reshape(-1))[1].float().max() / 2 + 1e-5

    for ours, exact in ((multiply, torch.mul), (matmul, torch.matmul)):
        actual = torch.autograd.grad(ours(a, b, codec), (a, b), grad)
        expected = torch.autograd.grad(exact(a, b), (a, b), grad)
        if ours is multiply:
            bounds = [grad.abs() * delta(b), grad.abs() * delta(a)]
        else:
            bounds = [grad.abs().sum(-1, True) * delta(b), grad.abs().sum(-2, True) * delta(a)]
        for one, other, bound in zip(actual, expected, bounds, strict=True):
            assert ((one - other).abs() <= bound * (1 + 1e-5) + 1e-5).all()


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
@pytest.mark.parametrize("product", [multiply, matmul])
def test_bytes_kept(product: Any, num_bits: int, leaf: Any, kept_bytes: Any) -> None:
    a, b = leaf(2, 32, 32), leaf(2, 32, 32)
    codec = GroupAffineCodec(num_bits)
    of_one = 2 * (1024 * num_bits // 8 + 16 * 4)
    assert kept_bytes(lambda: product(a, b, codec)) == 2 * of_one


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_keeps_only_what_the_gradients_need(needs: tuple[bool, bool], leaf: Any, kept_bytes: Any) -> None:
    a, b = leaf(2, 32, 32, needs=needs[0]), leaf(4, 1, 32, 32, needs=needs[1])
    needed = (b if needs[0] else a).numel() // 1024 * (1024 // 2 + 16 * 4)
    assert kept_bytes(lambda: multiply(a, b, GroupAffineCodec(4))) == needed


def test_not_finite_where_torch_is_not(leaf: Any) -> None:
    a, b = leaf(2, 32, 32).detach(), leaf(2, 32, 32)
    a[1, 2, 3] = float("inf")
    a.requires_grad_()
    (expected,) = torch.autograd.grad((a * b).sum(), b)
    (actual,) = torch.autograd.grad(multiply(a, b, GroupAffineCodec(4)).sum(), b)
    assert not actual[~expected.isfinite()].isfinite().any()
    assert actual[0].isfinite().all()


def test_double_backward(leaf: Any, refuses_double_backward: Any) -> None:
    b = leaf(4, 8)
    refuses_double_backward(lambda a: multiply(a, b, IDENTITY), leaf(4, 8))
