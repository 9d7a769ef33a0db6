"""Products in bfloat16 of what comes out of codes: close in value, exact in the gradients, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_s2a.interception import ActivationMode
from peft_s2a.ops import short_product as module
from peft_s2a.ops.lineage import compile_program
from peft_s2a.ops.short_product import short_linear, short_product, short_products
from peft_s2a.settings import ActivationSettings

B, L, D, E = 2, 6, 256, 192


@pytest.fixture(params=[True, False], ids=["bfloat16", "full"])
def device_can(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: request.param)
    return bool(request.param)


@pytest.fixture
def device_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: True)


def layer(leaf: Any) -> tuple[Tensor, Tensor, Tensor]:
    return leaf(B, L, D), leaf(E, D, needs=False) / D**0.5, leaf(E)


@pytest.mark.parametrize("with_bias", [True, False])
def test_value(device_can: bool, with_bias: bool, leaf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_WEIGHTS", 64 * D)  # three pieces
    x, weight, bias = (t.detach() for t in layer(leaf))
    found = short_product(x, weight, bias if with_bias else None)
    expected = F.linear(x, weight, bias if with_bias else None)
    assert found.dtype == torch.float32
    error = (found - expected).norm() / expected.norm()
    assert (0 < error < 2**-8) if device_can else (error == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_multiplied_as_they_are(device_does: None, dtype: torch.dtype, leaf: Any) -> None:
    x, weight, bias = (t.detach().to(dtype) for t in layer(leaf))
    torch.testing.assert_close(short_product(x, weight, bias), F.linear(x, weight, bias), rtol=0, atol=0)
    with short_products(True):
        assert short_linear(x, weight, bias) is None


def test_gradients_are_those_of_the_full_product(device_does: None, leaf: Any) -> None:
    x, weight, bias = layer(leaf)
    grad = torch.randn(B, L, E)
    with short_products(True):
        output = short_linear(x, weight, bias)
    found = torch.autograd.grad(output, (x, bias), grad)
    expected = torch.autograd.grad(F.linear(x, weight, bias), (x, bias), grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_only_inside(device_does: None, leaf: Any) -> None:
    inputs = layer(leaf)
    assert short_linear(*inputs) is None
    with short_products(True), short_products(False):
        assert short_linear(*inputs) is None


@pytest.mark.parametrize("bits", [8, None], ids=["codes", "exact"])
def test_what_is_kept_exactly_is_multiplied_in_full(device_does: None, bits: int | None, leaf: Any) -> None:
    x, weight, bias = layer(leaf)
    mode = ActivationMode(ActivationSettings.from_config({"source": bits, "norm": bits}, activation_policy="rebuild"))
    with mode:
        y = F.linear(F.layer_norm(x, (D,)), weight, bias)
    node = mode.context.lineage.get(y)
    if node is None:
        assert bits is None  # nothing is rebuilt from what is not coded
        return
    program, leaves = compile_program([node])
    assert program.instructions[-1].step.short == (bits == 8)
    (again,) = program.run(leaves)
    assert (again - y).norm() < 0.02 * y.norm()
