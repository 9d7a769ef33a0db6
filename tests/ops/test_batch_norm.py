"""BatchNorm in training and with fixed statistics."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_s2a.codecs.affine import GroupAffineCodec
from peft_s2a.codecs.base import IdentityCodec
from peft_s2a.ops.batch_norm import batch_norm
from peft_s2a.settings import BIT_LEVELS

IDENTITY = IdentityCodec()
NEEDS = [n for n in itertools.product([True, False], repeat=3) if any(n)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "batch_not_first_in_memory": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: x[..., ::2],
    "matrix": lambda x: x.flatten(2).mean(-1),
    "sequence": lambda x: x.flatten(2),
}


def train(x: Tensor, weight: Tensor | None, bias: Tensor | None, codec: Any = IDENTITY) -> Tensor:
    return batch_norm(x, None, None, weight, bias, True, 0.1, 1e-5, codec)


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (2, 3, 2, 4)])
def test_gradcheck(shape: tuple[int, ...], needs: tuple[bool, bool, bool], leaf: Any) -> None:
    x = leaf(*shape, dtype=torch.double, needs=needs[0])
    weight, bias = leaf(3, dtype=torch.double, needs=needs[1]), leaf(3, dtype=torch.double, needs=needs[2])
    assert torch.autograd.gradcheck(train, (x, weight, bias))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("chunks", ["whole", "pieces"])
def test_training(
    layout: str,
    dtype: torch.dtype,
    affine: bool,
    chunks: str,
    leaf: Any,
    same_as_torch: Any,
    request: pytest.FixtureRequest,
) -> None:
    if chunks == "pieces":
        request.getfixturevalue("small_chunks")
    change = LAYOUTS[layout]
    x = leaf(6, 4, 8, 16, dtype=dtype)
    weight, bias = (leaf(4), leaf(4)) if affine else (None, None)
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    same_as_torch(
        lambda x, w, b: train(change(x), w, b),
        lambda x, w, b: F.batch_norm(change(x), None, None, w, b, True),
        x,
        weight,
        bias,
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("affine", [True, False])
def test_fixed_statistics_are_torchs_to_rounding(
    layout: str, dtype: torch.dtype, affine: bool, leaf: Any, same_as_torch: Any, kept_bytes: Any
) -> None:
    change = LAYOUTS[layout]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, mean = leaf(6, 4, 8, 16, dtype=dtype), leaf(4, dtype=wide, needs=False)
    variance = leaf(4, dtype=wide, needs=False).square() + 0.1
    weight = leaf(4, dtype=wide, needs=False) if affine else None
    bias = leaf(4, dtype=wide) if affine else None
    constant = None if bias is None else bias.detach()
    same_as_torch(
        lambda x: batch_norm(change(x), mean, variance, weight, constant, False, 0.1, 1e-5, IDENTITY),
        lambda x: F.batch_norm(change(x), mean, variance, weight, constant, False, 0.1, 1e-5),
        x,
        rtol=4 * torch.finfo(dtype).eps,
        atol=0,
    )
    if bias is not None:  # a sum: the order of its terms is not torch's
        output = batch_norm(change(x), mean, variance, weight, bias, False, 0.1, 1e-5, IDENTITY)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        (found,) = torch.autograd.grad(output, bias, grad)
        exact = grad.double().sum([d for d in range(grad.dim()) if d != 1])
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    known = [t for t in (mean, variance, weight) if t is not None]
    call = lambda: batch_norm(x, mean, variance, weight, bias, False, 0.1, 1e-5, IDENTITY)  # noqa: E731
    assert kept_bytes(call, known) == 0


def test_running_statistics_move_as_in_torch(leaf: Any) -> None:
    x = leaf(6, 4, 8, 16)
    ours, theirs = (torch.zeros(4), torch.ones(4)), (torch.zeros(4), torch.ones(4))
    batch_norm(x, *ours, None, None, True, 0.3, 1e-5, IDENTITY)
    F.batch_norm(x, *theirs, None, None, True, 0.3, 1e-5)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


def test_one_value_per_channel_is_the_error_of_torch(leaf: Any) -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        train(leaf(1, 2048), None, None)


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_error_follows_from_the_codec(num_bits: int, leaf: Any) -> None:
    x, weight, bias = leaf(4, 8, 8, 8), leaf(8), leaf(8)
    grad = leaf(4, 8, 8, 8, needs=False)
    codec = GroupAffineCodec(num_bits)
    exact = torch.autograd.grad(train(x, weight, bias), (x, weight, bias), grad)
    coded = torch.autograd.grad(train(x, weight, bias, codec), (x, weight, bias), grad)
    torch.testing.assert_close(coded[2], exact[2])
    variance, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0, keepdim=True)
    invstd = (variance + 1e-5).rsqrt()
    x_hat = (x.detach() - mean) * invstd
    delta = codec.encode(x_hat.reshape(-1))[1].float().max() / 2 + 1e-5
    assert ((coded[1] - exact[1]).abs() <= delta * grad.abs().sum((0, 2, 3)) + 1e-4).all()
    magnitude = grad.abs().mean((0, 2, 3), keepdim=True)
    projection = (grad * x_hat).mean((0, 2, 3), keepdim=True).abs()
    factor = (weight.detach().view(1, -1, 1, 1) * invstd).abs()
    bound = factor * (delta * (projection + delta * magnitude) + x_hat.abs() * delta * magnitude)
    assert ((coded[0] - exact[0]).abs() <= bound + 1e-4).all()


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_bytes_kept(num_bits: int, leaf: Any, kept_bytes: Any) -> None:
    x, weight, bias = leaf(4, 8, 8, 8), leaf(8), leaf(8)
    codec = GroupAffineCodec(num_bits)
    kept = kept_bytes(lambda: train(x, weight, bias, codec), (weight,))
    assert kept == 8 * 4 + 2 * (1024 * num_bits // 8 + 16 * 4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_not_finite_where_torch_is_not(poison: float, leaf: Any) -> None:
    x = leaf(4, 8, 8, 16).detach()
    x[1, 2, 3, 4] = poison
    x.requires_grad_()
    (expected,) = torch.autograd.grad(F.batch_norm(x, None, None, training=True).square().sum(), x)
    (actual,) = torch.autograd.grad(train(x, None, None, GroupAffineCodec(4)).square().sum(), x)
    assert not actual[~expected.isfinite()].isfinite().any()
    assert expected[:, 2].isnan().all()


def test_double_backward(leaf: Any, refuses_double_backward: Any) -> None:
    refuses_double_backward(lambda x: train(x, None, None), leaf(4, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fixed_statistics_in_short_dtypes_lose_no_more_than_rounding(dtype: torch.dtype, leaf: Any) -> None:
    x = leaf(2, 16, 8, 8, dtype=dtype)
    mean, weight = leaf(16, dtype=dtype, needs=False), leaf(16, dtype=dtype, needs=False)
    variance = leaf(16, dtype=dtype, needs=False).square() + 0.1
    grad = leaf(2, 16, 8, 8, dtype=dtype, needs=False)
    (found,) = torch.autograd.grad(batch_norm(x, mean, variance, weight, None, False, 0.1, 1e-5, IDENTITY), x, grad)
    factor = weight.double() / (variance.double() + 1e-5).sqrt()
    torch.testing.assert_close(
        found.double(), grad.double() * factor.view(-1, 1, 1), rtol=0.6 * torch.finfo(dtype).eps, atol=1e-7
    )
