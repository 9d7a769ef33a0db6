"""Products of backward in bfloat16: close in value, of large float32 products alone, where they are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_s2a.codecs.base import IdentityCodec
from peft_s2a.mode import ActivationMode
from peft_s2a.ops import short_product as module
from peft_s2a.ops.lineage import compile_program
from peft_s2a.ops.linear import LinearFunction
from peft_s2a.ops.short_product import gains_from_short, products_again, short_gradient, short_linear, short_product
from peft_s2a.settings import ActivationSettings

B, L, D, E = 2, 6, 256, 192
SHORT = 2**-8
"""More than the relative error of a sum of products of numbers that were rounded to bfloat16."""


@pytest.fixture(params=[True, False], ids=["bfloat16", "full"])
def device_can(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(module, "MIN_WORK", 1)
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: request.param)
    return bool(request.param)


@pytest.fixture
def device_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_WORK", 1)
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: True)


def layer(leaf: Any) -> tuple[Tensor, Tensor, Tensor]:
    return leaf(B, L, D), leaf(E, D, needs=False) / D**0.5, leaf(E)


def error(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("with_bias", [True, False])
def test_value(device_can: bool, with_bias: bool, leaf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_WEIGHTS", 64 * D)  # three pieces
    x, weight, bias = (t.detach() for t in layer(leaf))
    found = short_product(x, weight, bias if with_bias else None)
    expected = F.linear(x, weight, bias if with_bias else None)
    assert found.dtype == torch.float32
    assert (0 < error(found, expected) < SHORT) if device_can else (error(found, expected) == 0)


@pytest.mark.parametrize("rows", [1, 4, B * L])
def test_gradient_in_pieces(rows: int, leaf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_WEIGHTS", 64 * E)
    monkeypatch.setattr(module, "CPU_ROWS", rows)
    _, weight, _ = layer(leaf)
    grad = leaf(B, L, E, needs=False)
    for given in (grad, grad.transpose(0, 1), grad[:, :1].expand(B, L, E), grad[0], grad[0, 0]):
        found = short_gradient(given, weight)
        assert found.dtype == torch.float32
        assert found.shape == (*given.shape[:-1], D)
        assert 0 < error(found, given @ weight) < SHORT


@pytest.mark.parametrize(
    ("shape", "channels", "dtype", "expected"),
    [
        ((8, 197, 768), 768, torch.float32, True),
        ((8, 197, 768), 768, torch.bfloat16, False),
        ((8, 197, 768), 768, torch.float64, False),
        ((2, 17, 384), 384, torch.float32, False),  # small
        ((8, 3136, 96), 384, torch.float32, False),  # narrow
    ],
)
def test_where_it_is_a_gain(
    shape: tuple[int, ...], channels: int, dtype: torch.dtype, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: True)
    input, weight = torch.empty(shape, dtype=dtype), torch.empty(channels, shape[-1], dtype=dtype)
    assert gains_from_short(input, weight) == expected
    if not expected and dtype != torch.float32:
        input, weight = input.zero_(), weight.zero_()
        assert short_product(input, weight, None).dtype == dtype


def test_a_weight_of_one_dimension(device_does: None, leaf: Any) -> None:
    x, weight = leaf(3, D), leaf(D, needs=False)
    with ActivationMode(ActivationSettings.from_config(4)):
        output = F.linear(x, weight)
    (found,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(found, weight.expand(3, D))


def test_a_backward_under_autocast(device_does: None, leaf: Any) -> None:
    _, weight, _ = layer(leaf)
    grad = torch.full((L, E), 1e6)  # beyond float16
    with torch.autocast("cpu", torch.float16):
        assert short_gradient(grad, weight).isfinite().all()


def test_forward_is_in_full_until_it_is_taken_again(device_does: None, leaf: Any) -> None:
    x, weight, bias = layer(leaf)
    expected = F.linear(x, weight, bias)
    assert error(short_linear(x, weight, bias), expected) == 0
    with products_again(True):
        assert 0 < error(short_linear(x, weight, bias), expected) < SHORT
        with products_again(False):
            assert error(short_linear(x, weight, bias), expected) == 0


def test_gradients(device_does: None, leaf: Any) -> None:
    x, weight, bias = layer(leaf)
    grad = torch.randn(B, L, E)
    found = torch.autograd.grad(short_linear(x, weight, bias), (x, bias), grad)
    expected = torch.autograd.grad(F.linear(x, weight, bias), (x, bias), grad)
    assert 0 < error(found[0], expected[0]) < SHORT
    torch.testing.assert_close(found[1], expected[1])  # a sum, no product


@pytest.mark.parametrize(
    ("bits", "precision", "short"),
    [
        (4, "auto", True),
        ({"gelu": None, "norm": None}, "auto", True),
        (None, "auto", False),
        (None, "medium", True),
        (4, "highest", False),
    ],
)
def test_precision(bits: Any, precision: str, short: bool, device_can: bool, leaf: Any) -> None:
    x, weight, bias = layer(leaf)
    with ActivationMode(ActivationSettings.from_config(bits, backward_precision=precision)):
        output = F.linear(x, weight, bias)
    assert torch.equal(output, F.linear(x, weight, bias))
    grad = torch.randn(B, L, E)
    (found,) = torch.autograd.grad(output, x, grad)
    assert (0 < error(found, grad @ weight) < SHORT) if short and device_can else torch.equal(found, grad @ weight)


def test_autocast_multiplies_in_its_own_dtype(device_does: None, leaf: Any) -> None:
    x, weight, bias = layer(leaf)
    with ActivationMode(ActivationSettings.from_config(4)), torch.autocast("cpu", torch.bfloat16):
        output = F.linear(x, weight, bias)
    assert output.dtype == torch.bfloat16
    assert type(output.grad_fn).__name__ == f"{LinearFunction.__name__}Backward"
    assert isinstance(output.grad_fn.codec, IdentityCodec)  # type: ignore[union-attr]


@pytest.mark.parametrize(("bits", "precision"), [(8, "auto"), (8, "highest"), (None, "auto")])
def test_what_is_rebuilt_from_codes(device_does: None, bits: int | None, precision: str, leaf: Any) -> None:
    x, weight, bias = layer(leaf)
    settings = ActivationSettings.from_config(
        {"source": bits, "norm": bits}, activation_policy="rebuild", backward_precision=precision
    )
    mode = ActivationMode(settings)
    with mode:
        y = F.linear(F.layer_norm(x, (D,)), weight, bias)
    node = mode.context.lineage.get(y)
    if node is None:
        assert bits is None  # nothing is rebuilt from what is not coded
        return
    program, leaves = compile_program([node])
    assert program.instructions[-1].step.short == (bits == 8 and precision == "auto")
    (again,) = program.run(leaves)
    assert (again - y).norm() < 0.02 * y.norm()


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="backward_precision='low' is not one of auto, medium, highest"):
        ActivationSettings.from_config(4, backward_precision="low")


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, False),
        ({}, False),
    ],
    ids=["tiles", "Intel without tiles", "AMD", "before bfloat16", "unknown"],
)
def test_which_processors_gain(known: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    module.multiplies_bfloat16.cache_clear()
    assert module.multiplies_bfloat16(torch.device("cpu")) == expected
    module.multiplies_bfloat16.cache_clear()
