"""The result of an activation function takes the place of its input, and nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_s2a.mode import ActivationMode
from peft_s2a.settings import ActivationSettings

B, D = 32, 128
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(4 * D, D, generator=GENERATOR) / D**0.5


@pytest.fixture(params=["keep", "rebuild"])
def mode(request: pytest.FixtureRequest) -> ActivationMode:
    return ActivationMode(ActivationSettings.from_config(8, activation_policy=request.param))


def normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, (D,))


def test_the_result_takes_the_input_s_memory(mode, leaf):
    y0 = normalised(leaf(B, D))
    with mode:
        h = F.linear(y0, WEIGHT)
    place = h.data_ptr()  # inside, this would be a look at the tensor
    with mode:
        y = F.gelu(h)
    assert y.data_ptr() == place
    assert y.grad_fn is not None
    assert y._base is None  # autograd knows no view, and makes no copies of the gradient for one


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "in a sum": lambda h: h + 0.0,
    "in a list": lambda h: torch.stack([h, h])[1],
    "by keyword": lambda h: torch.add(input=h, other=0.0),
    "as a view": lambda h: h[:],
    "printed": lambda h: (repr(h), h.clone())[1],
}


@pytest.mark.parametrize("look", list(LOOKS))
def test_whoever_looks_again_sees_the_input(mode, leaf, look):
    x = leaf(B, D)
    expected = F.linear(normalised(x), WEIGHT).detach()
    with mode:
        y0 = normalised(x)
        h = F.linear(y0, WEIGHT)
        y = F.gelu(h)
        again = LOOKS[look](h)
    torch.testing.assert_close(again.detach(), expected, rtol=0, atol=0)
    torch.testing.assert_close(y.detach(), F.gelu(expected), rtol=0, atol=0)


def test_whoever_kept_it_sees_the_input_after_the_model_has_run(leaf):
    from peft_s2a.interception import ActivationInterceptor

    model = torch.nn.Sequential(torch.nn.LayerNorm(D), torch.nn.Linear(D, 4 * D), torch.nn.GELU())
    model[1].weight.requires_grad_(False)
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    interceptor = ActivationInterceptor()
    interceptor.layer = type("Layer", (), {"disable_adapters": False, "active_adapters": ["default"]})()
    interceptor.set_adapter_settings("default", ActivationSettings.from_config(4))
    interceptor.attach(model)
    x = leaf(B, D)
    y = model(x)
    torch.testing.assert_close(seen[0], F.linear(model[0](x), model[1].weight, model[1].bias), rtol=0, atol=0)
    torch.testing.assert_close(y, F.gelu(seen[0]), rtol=0, atol=0)


@pytest.mark.parametrize(
    "use",
    [
        lambda y0, h: h * 2,  # somebody used it before: who knows what was kept of it
        lambda y0, h: h.mul_(2),
        lambda y0, h: y0.detach().mul_(0),  # it could not be made again
        lambda y0, h: h.register_hook(lambda g: g) and None,
    ],
)
def test_an_input_that_was_used_before_is_left_alone(mode, leaf, use):
    with mode:
        y0 = normalised(leaf(B, D)) + 0.0
        h = F.linear(y0, WEIGHT)
        use(y0, h)
    place = h.data_ptr()
    with mode:
        y = F.gelu(h)
    assert y.data_ptr() != place


@pytest.mark.parametrize("in_place", [torch.relu_, torch.sigmoid_, torch.celu_, lambda h: F.elu(h, inplace=True)])
def test_functions_in_place_before_and_after(mode, leaf, in_place):
    x = leaf(B, D)
    expected = F.linear(normalised(x), WEIGHT)
    changed = in_place(expected.clone())
    with mode:
        h = F.linear(normalised(x), WEIGHT)
        y = F.gelu(h)  # takes the memory of h
        in_place(h)  # made anew first, and changed then: y stays what it is
    torch.testing.assert_close(y.detach(), F.gelu(expected).detach(), rtol=0, atol=0)
    torch.testing.assert_close(h.detach(), changed.detach(), rtol=0, atol=0)
    with mode:
        h = in_place(F.linear(normalised(x), WEIGHT))
        y = F.gelu(h)  # how h came about is not known: it is left alone
        found = torch.autograd.grad(y.square().sum(), x)[0]
        again = h + 0.0
    torch.testing.assert_close(again.detach(), changed.detach(), rtol=0, atol=0)
    (exact,) = torch.autograd.grad(F.gelu(changed).square().sum(), x)
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_an_input_that_no_linear_layer_made_is_left_alone(mode, leaf):
    with mode:
        h = leaf(B, D) * 2
        y = F.gelu(h)
    assert y.data_ptr() != h.data_ptr()


def test_gradients_are_those_without_overwriting(mode, leaf):
    x = leaf(B, D)
    found = []
    for keep in (False, True):
        with mode:
            h = F.linear(normalised(x), WEIGHT)
            if keep:
                h + 0.0  # looked at: left alone
            found.append(torch.autograd.grad(F.gelu(h).square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_an_input_changed_in_between_is_an_error_that_says_so(mode, leaf):
    with mode:
        y0 = normalised(leaf(B, D)) + 0.0
        h = F.linear(y0, WEIGHT)
        F.gelu(h)
        with torch.no_grad():
            y0.mul_(2)
        with pytest.raises(RuntimeError, match="used after its activation function"):
            h + 0.0


def test_without_gradients_too_in_a_run_that_is_repeated(leaf):
    mode = ActivationMode(ActivationSettings.from_config(4, activation_policy="recompute"))
    x = leaf(B, D, needs=False)
    with torch.no_grad(), mode:
        y0 = normalised(x)
        h = F.linear(y0, WEIGHT)
    place = h.data_ptr()
    with torch.no_grad(), mode:
        y = F.gelu(h)
        torch.testing.assert_close(h + 0.0, F.linear(normalised(x), WEIGHT), rtol=0, atol=0)
    assert y.data_ptr() == place
