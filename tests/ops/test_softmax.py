"""Softmax along the last dimension."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_s2a.codecs.probability import RowCodec, SqrtProbabilityCodec
from peft_s2a.ops.softmax import softmax
from peft_s2a.settings import BIT_LEVELS


def test_gradcheck(leaf: Any) -> None:
    assert torch.autograd.gradcheck(lambda x: softmax(x, None, RowCodec()), leaf(3, 4, 5, dtype=torch.double))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "empty", "vector"])
def test_dtypes_and_layouts(dtype: torch.dtype, layout: str, leaf: Any, same_as_torch: Any, small_chunks: None) -> None:
    change = {
        "contiguous": lambda x: x,
        "transposed": lambda x: x.mT,
        "sliced": lambda x: x[..., ::2],
        "empty": lambda x: x[:0],
        "vector": lambda x: x[0, 0],
    }[layout]
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float32: 1e-6}[dtype]
    x = leaf(3, 6, 40, dtype=dtype)
    same_as_torch(
        lambda x: softmax(change(x), None, RowCodec()),
        lambda x: torch.softmax(change(x), -1),
        x,
        rtol=tolerance,
        atol=tolerance,
    )


def test_wider_output(leaf: Any, same_as_torch: Any) -> None:
    x = leaf(4, 9, dtype=torch.bfloat16)
    same_as_torch(
        lambda x: softmax(x, torch.float32, RowCodec()),
        lambda x: torch.softmax(x, -1, torch.float32),
        x,
        rtol=1e-2,
        atol=1e-2,
    )


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 8.0])
def test_error_follows_from_the_codec(num_bits: int, sharpness: float, leaf: Any) -> None:
    x, grad = leaf(20, 33, scale=sharpness), leaf(20, 33, needs=False)
    codec = SqrtProbabilityCodec(num_bits)
    output = softmax(x, None, codec)
    (dx,) = torch.autograd.grad(output, x, grad)
    p = output.detach()
    decoded = codec.decode(codec.encode(p), 33, torch.float32)
    exact = p * (grad - (grad * p).sum(-1, keepdim=True))
    delta = (decoded - p).abs()
    bound = delta * (grad - (grad * p).sum(-1, keepdim=True)).abs() + decoded * (grad.abs() * delta).sum(
        -1, keepdim=True
    )
    assert ((dx - exact).abs() <= bound * (1 + 1e-5) + 1e-6).all()
    # rows of the gradient sum to zero, as they do exactly
    torch.testing.assert_close(dx.sum(-1), torch.zeros(20), rtol=0, atol=1e-5)


@pytest.mark.parametrize("codec", [RowCodec(), SqrtProbabilityCodec(4), SqrtProbabilityCodec(3)], ids=str)
def test_pieces(codec: RowCodec, leaf: Any, request: pytest.FixtureRequest) -> None:
    x, grad = leaf(50, 21), leaf(50, 21, needs=False)
    (whole,) = torch.autograd.grad(softmax(x, None, codec), x, grad)
    request.getfixturevalue("small_chunks")
    (pieces,) = torch.autograd.grad(softmax(x, None, codec), x, grad)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_bytes_kept(num_bits: int, leaf: Any, kept_bytes: Any) -> None:
    x = leaf(2, 5, 16)
    assert kept_bytes(lambda: softmax(x, None, SqrtProbabilityCodec(num_bits))) == 10 * (2 * num_bits + 2)


def test_masked_and_nan_rows(leaf: Any) -> None:
    x = leaf(4, 64).detach()
    x[1, 10:] = -float("inf")
    x[2] = -float("inf")  # nothing to attend to: NaN in torch
    x[3, 3] = float("nan")
    x.requires_grad_()
    (expected,) = torch.autograd.grad(torch.softmax(x, -1)[:, 0].sum(), x)
    (actual,) = torch.autograd.grad(softmax(x, None, SqrtProbabilityCodec(8))[:, 0].sum(), x)
    assert torch.equal(actual.isnan(), expected.isnan())
    torch.testing.assert_close(actual[:2], expected[:2], rtol=0.05, atol=2e-3)


def test_double_backward(leaf: Any, refuses_double_backward: Any) -> None:
    refuses_double_backward(lambda x: softmax(x, None, RowCodec()), leaf(4, 8))
