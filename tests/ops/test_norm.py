"""LayerNorm and RMSNorm."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_s2a.codecs.affine import GroupAffineCodec
from peft_s2a.codecs.base import IdentityCodec
from peft_s2a.ops.norm import layer_norm, rms_norm
from peft_s2a.settings import BIT_LEVELS

IDENTITY = IdentityCodec()
NEEDS = [n for n in itertools.product([True, False], repeat=3) if any(n)]


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_layer_norm_gradcheck(needs: tuple[bool, bool, bool], shape: tuple[int, ...], leaf: Any) -> None:
    x = leaf(4, *shape, dtype=torch.double, needs=needs[0])
    weight = leaf(*shape, dtype=torch.double, needs=needs[1])
    bias = leaf(*shape, dtype=torch.double, needs=needs[2])
    assert torch.autograd.gradcheck(lambda *a: layer_norm(a[0], shape, *a[1:], 1e-5, IDENTITY), (x, weight, bias))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_rms_norm_gradcheck(needs: tuple[bool, bool], leaf: Any) -> None:
    x, weight = leaf(4, 6, dtype=torch.double, needs=needs[0]), leaf(6, dtype=torch.double, needs=needs[1])
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, (6,), w, 1e-5, IDENTITY), (x, weight))


def test_without_weight(leaf: Any, same_as_torch: Any) -> None:
    x, bias = leaf(3, 4, dtype=torch.double), leaf(4, dtype=torch.double)
    close = {"rtol": 1e-9, "atol": 1e-12}
    same_as_torch(
        lambda x: layer_norm(x, (4,), None, None, 1e-5, IDENTITY), lambda x: F.layer_norm(x, (4,)), x, **close
    )
    same_as_torch(lambda x: rms_norm(x, (4,), None, None, IDENTITY), lambda x: F.rms_norm(x, (4,)), x, **close)
    same_as_torch(
        lambda x, b: layer_norm(x, (4,), None, b, 1e-5, IDENTITY),
        lambda x, b: F.layer_norm(x, (4,), None, b),
        x,
        bias,
        **close,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced", "single_row", "empty"])
def test_dtypes_and_layouts(dtype: torch.dtype, layout: str, leaf: Any, same_as_torch: Any) -> None:
    x = leaf(3, 6, 40, dtype=dtype)
    change = {
        "contiguous": lambda x: x,
        "permuted": lambda x: x.permute(1, 0, 2),
        "sliced": lambda x: x[:, ::2],
        "single_row": lambda x: x[0, 0],
        "empty": lambda x: x[:0],
    }[layout]
    weight, bias = leaf(40, dtype=dtype), leaf(40, dtype=dtype)
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 1e-5}[dtype]
    same_as_torch(
        lambda x, w, b: layer_norm(change(x), (40,), w, b, 1e-5, IDENTITY),
        lambda x, w, b: F.layer_norm(change(x), (40,), w, b),
        x,
        weight,
        bias,
        rtol=tolerance,
        atol=tolerance,
    )
    same_as_torch(
        lambda x, w: rms_norm(change(x), (40,), w, None, IDENTITY),
        lambda x, w: F.rms_norm(change(x), (40,), w),
        x,
        weight,
        rtol=tolerance,
        atol=tolerance,
    )


def test_wide_weights_of_a_narrow_input(leaf: Any) -> None:
    """Autocast leaves the weights in float32."""
    x, weight, bias = leaf(4, 8, dtype=torch.bfloat16), leaf(8), leaf(8)
    output = layer_norm(x, (8,), weight, bias, 1e-5, IDENTITY)
    expected = F.layer_norm(x, (8,), weight, bias)
    assert torch.equal(output, expected)
    grads = torch.autograd.grad(output.sum(), (x, weight, bias))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


def channels_first(x: Tensor) -> Tensor:
    """What a channels-first norm does: a view with the channels last."""
    return x.permute(0, 2, 3, 1)


def test_channels_first_map(leaf: Any, same_as_torch: Any) -> None:
    x = leaf(2, 16, 4, 4)
    weight, bias = leaf(16), leaf(16)
    same_as_torch(
        lambda x, w, b: layer_norm(channels_first(x), (16,), w, b, 1e-6, IDENTITY),
        lambda x, w, b: F.layer_norm(channels_first(x), (16,), w, b, 1e-6),
        x,
        weight,
        bias,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_error_follows_from_the_codec(norm: str, num_bits: int, leaf: Any) -> None:
    rows, width = 32, 128
    x, weight, bias = leaf(rows, width), leaf(width), leaf(width)
    grad = leaf(rows, width, needs=False)

    def run(codec: Any) -> list[Tensor]:
        if norm == "layer":
            return list(torch.autograd.grad(layer_norm(x, (width,), weight, bias, 1e-5, codec), (x, weight), grad))
        return list(torch.autograd.grad(rms_norm(x, (width,), weight, 1e-5, codec), (x, weight), grad))

    exact_dx, exact_dw = run(IDENTITY)
    dx, dw = run(GroupAffineCodec(num_bits))
    wide = x.detach()
    if norm == "layer":
        variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    else:
        variance, mean = wide.square().mean(-1, keepdim=True), torch.zeros(rows, 1)
    rstd = (variance + 1e-5).rsqrt()
    x_hat = (wide - mean) * rstd
    codec = GroupAffineCodec(num_bits)
    delta = codec.encode(x_hat.reshape(-1))[1].float().max() / 2 + 1e-5
    # dW = sum g x_hat, and |x_hat' mean(g x_hat') - x_hat mean(g x_hat)| with |x_hat' - x_hat| <= delta
    assert ((dw - exact_dw).abs() <= delta * grad.abs().sum(0) + 1e-4).all()
    g = (grad * weight.detach()).abs()
    magnitude = g.mean(-1, keepdim=True)
    projection = (grad * weight.detach() * x_hat).mean(-1, keepdim=True).abs()
    bound = rstd * (delta * (projection + delta * magnitude) + x_hat.abs() * delta * magnitude)
    assert ((dx - exact_dx).abs() <= bound + 1e-4).all()


@pytest.mark.parametrize("width", [7, 96, 1000])
@pytest.mark.parametrize("codec", [IDENTITY, GroupAffineCodec(4)], ids=str)
def test_pieces(codec: Any, width: int, leaf: Any, request: pytest.FixtureRequest) -> None:
    x, weight, bias = leaf(150, width), leaf(width), leaf(width)
    grad = leaf(150, width, needs=False)

    def run() -> tuple[Tensor, ...]:
        output = layer_norm(x, (width,), weight, bias, 1e-5, codec)
        return torch.autograd.grad(output, (x, weight, bias), grad)

    whole = run()
    request.getfixturevalue("small_chunks")
    for piece, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(piece, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_bytes_kept(num_bits: int, leaf: Any, kept_bytes: Any) -> None:
    x, weight, bias = leaf(16, 128), leaf(128), leaf(128)
    codec = GroupAffineCodec(num_bits)
    expected = 16 * 4 + 2 * (1024 * num_bits // 8 + 16 * 4)  # rstd; two rows of codes with 16 scales and zero points
    assert kept_bytes(lambda: layer_norm(x, (128,), weight, bias, 1e-5, codec), (weight,)) == expected
    assert kept_bytes(lambda: rms_norm(x, (128,), weight, 1e-5, codec), (weight,)) == expected


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_where_torch_is_not(poison: float, leaf: Any) -> None:
    x = leaf(32, 128).detach()
    x[20, 5] = poison
    x.requires_grad_()
    (expected,) = torch.autograd.grad(F.layer_norm(x, (128,)).sum(), x)
    output = layer_norm(x, (128,), None, None, 1e-5, GroupAffineCodec(4))
    (actual,) = torch.autograd.grad(output.sum(), x)
    assert expected[20].isnan().all()
    assert torch.equal(actual.isnan(), expected.isnan())


def test_constant_rows(leaf: Any) -> None:
    x = torch.full((8, 128), 3.0, requires_grad=True)
    grad = leaf(8, 128, needs=False)
    (expected,) = torch.autograd.grad(F.layer_norm(x, (128,)), x, grad)
    (actual,) = torch.autograd.grad(layer_norm(x, (128,), None, None, 1e-5, GroupAffineCodec(4)), x, grad)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-3)


def test_double_backward(leaf: Any, refuses_double_backward: Any) -> None:
    refuses_double_backward(lambda x: layer_norm(x, (64,), None, None, 1e-5, IDENTITY), leaf(4, 64))


def test_channels_of_one_image_that_lie_last_to_first():
    """One image whose channels are moved to the end is a strided view, also as rows."""
    x = torch.randn(1, 128, 40, 40).movedim(1, -1).requires_grad_()
    output = layer_norm(x, (128,), None, None, 1e-5, IdentityCodec())
    (grad,) = torch.autograd.grad(output.square().sum() / 2 + output.sum(), x)
    stock = torch.nn.functional.layer_norm(x, (128,))
    (expected,) = torch.autograd.grad(stock.square().sum() / 2 + stock.sum(), x)
    torch.testing.assert_close(output, stock)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)
