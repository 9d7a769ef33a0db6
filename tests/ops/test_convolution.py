"""Convolutions with a frozen weight: gradients are torch's own and nothing of the input is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from peft_s2a.ops import convolution as module
from peft_s2a.ops.convolution import convolution
from peft_s2a.settings import ActivationSettings
from peft_s2a.table import TABLE, Context

CONTEXT = Context(ActivationSettings())
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": (2, 1)},
    "grouped": {"groups": 2},
    "same": {"padding": "same"},
    "valid": {"padding": "valid", "stride": (2, 1)},
}


def geometry(dimensions: int) -> tuple[Any, ...]:
    return (1,) * dimensions, (1,) * dimensions, (1,) * dimensions, False, (0,) * dimensions, 1


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_gradcheck(dimensions: int, needs: tuple[bool, bool], leaf: Any) -> None:
    x = leaf(2, 3, *(4,) * dimensions, dtype=torch.double, needs=needs[0])
    weight = leaf(2, 3, *(3,) * dimensions, dtype=torch.double, needs=False)
    bias = leaf(2, dtype=torch.double, needs=needs[1])
    check = torch.autograd.gradcheck
    assert check(lambda x, b: convolution(x, weight, b, geometry(dimensions)), (x, bias), fast_mode=True)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bit_identical_to_torch(
    option: str, channels_last: bool, dtype: torch.dtype, leaf: Any, same_as_torch: Any
) -> None:
    options = OPTIONS[option]
    x = leaf(3, 4, 9, 11, dtype=dtype)
    weight, bias = leaf(6, 4 // options.get("groups", 1), 3, 3, dtype=dtype, needs=False), leaf(6, dtype=dtype)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    weight = weight.contiguous(memory_format=memory_format)
    handler = TABLE[torch.conv2d]
    calls = (
        lambda x, b: handler(CONTEXT, x.contiguous(memory_format=memory_format), weight, b, **options),
        lambda x, b: F.conv2d(x.contiguous(memory_format=memory_format), weight, b, **options),
    )
    same_as_torch(*calls, x, bias.detach())
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    same_as_torch(*calls, x.detach(), bias, rtol=tolerance, atol=tolerance)  # torch adds up in another order


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_dimensions_and_batches(dimensions: int, batch: int, leaf: Any, same_as_torch: Any) -> None:
    function = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    x = leaf(batch, 4, *(6,) * dimensions)
    weight = leaf(5, 4, *(3,) * dimensions, needs=False)
    same_as_torch(lambda x: TABLE[function](CONTEXT, x, weight), lambda x: function(x, weight), x)


def test_even_kernels_and_unbatched_inputs(leaf: Any, same_as_torch: Any) -> None:
    weight = leaf(5, 4, 2, 2, needs=False)
    assert TABLE[torch.conv2d](CONTEXT, leaf(2, 4, 6, 6), weight, padding="same") is NotImplemented
    assert TABLE[torch.conv2d](CONTEXT, leaf(4, 6, 6), weight) is NotImplemented
    assert TABLE[torch.conv2d](CONTEXT, leaf(2, 4, 6, 6), leaf(5, 4, 2, 2)) is NotImplemented
    same_as_torch(
        lambda x: TABLE[torch.conv2d](CONTEXT, x, weight, None, 2),
        lambda x: F.conv2d(x, weight, None, 2),
        leaf(2, 4, 6, 6),
    )


def test_nothing_is_kept(leaf: Any, kept_bytes: Any) -> None:
    x, weight, bias = leaf(2, 4, 8, 8), leaf(6, 4, 3, 3, needs=False), leaf(6)
    assert kept_bytes(lambda: TABLE[torch.conv2d](CONTEXT, x, weight, bias), (weight,)) == 0


def test_numbers_that_are_not_finite(leaf: Any, same_as_torch: Any) -> None:
    x = leaf(2, 4, 8, 8).detach()
    x[0, 0, 0, 0], x[1, 2, 3, 4] = float("nan"), float("inf")
    weight, bias = leaf(6, 4, 3, 3, needs=False), leaf(6)
    same_as_torch(
        lambda x, b: convolution(x, weight, b, geometry(2)),
        lambda x, b: F.conv2d(x, weight, b, padding=1),
        x.requires_grad_(),
        bias,
        rtol=1e-4,
        atol=1e-4,
    )


def test_double_backward(leaf: Any, refuses_double_backward: Any) -> None:
    weight = leaf(6, 4, 3, 3, needs=False)
    refuses_double_backward(lambda x: convolution(x, weight, None, geometry(2)), leaf(2, 4, 8, 8))


SHORT = 2**-8
"""More than the relative error of a sum of products of numbers that were rounded to bfloat16."""


@pytest.fixture(params=[True, False], ids=["bfloat16", "full"])
def device_can(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(module, "SHORT_WORK", 1)
    monkeypatch.setattr(module, "SHORT_CHANNELS", 1)
    monkeypatch.setattr(module, "CPU_PIECE", 4 * 9 * 11 * 2)  # pieces of two items and of one
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: request.param)
    return bool(request.param)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_short_gradients(option: str, channels_last: bool, device_can: bool, leaf: Any) -> None:
    options = OPTIONS[option]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = leaf(3, 4, 9, 11).detach().contiguous(memory_format=layout).requires_grad_()
    weight, bias = leaf(6, 4 // options.get("groups", 1), 3, 3, needs=False), leaf(6)
    handler = TABLE[torch.conv2d]
    output = handler(Context(ActivationSettings.from_config(4)), x, weight, bias, **options)
    expected = F.conv2d(x, weight, bias, **options)
    assert torch.equal(output, expected)
    grad = torch.randn_like(output)
    found, wanted = (torch.autograd.grad(y, (x, bias), grad) for y in (output, expected))
    torch.testing.assert_close(found[1], wanted[1])
    error = float((found[0] - wanted[0]).norm() / wanted[0].norm())
    if device_can and options.get("groups", 1) == 1:
        assert 0 < error < SHORT
        assert found[0].is_contiguous(memory_format=layout)
    else:
        assert error == 0


def test_short_gradients_of_transposed_convolutions(device_can: bool, leaf: Any) -> None:
    x, weight = leaf(3, 4, 9, 11), leaf(4, 6, 3, 3, needs=False)
    handler = TABLE[torch.conv_transpose2d]
    output = handler(Context(ActivationSettings.from_config(4)), x, weight, None, 2, 1)
    grad = torch.randn_like(output)
    (found,) = torch.autograd.grad(output, x, grad)
    (wanted,) = torch.autograd.grad(F.conv_transpose2d(x, weight, None, 2, 1), x, grad)
    error = float((found - wanted).norm() / wanted.norm())
    assert (0 < error < SHORT) if device_can else error == 0


def test_small_narrow_and_exact_ones_are_in_full(leaf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: True)
    weight = leaf(6, 4, 3, 3, needs=False)
    for limits, bits in (((1 << 27, 1), 4), ((1, 64), 4), ((1, 1), None)):
        monkeypatch.setattr(module, "SHORT_WORK", limits[0])
        monkeypatch.setattr(module, "SHORT_CHANNELS", limits[1])
        x = leaf(3, 4, 9, 11)
        output = TABLE[torch.conv2d](Context(ActivationSettings.from_config(bits)), x, weight)
        grad = torch.randn_like(output)
        (found,) = torch.autograd.grad(output, x, grad)
        assert torch.equal(found, *torch.autograd.grad(F.conv2d(x, weight), x, grad))
