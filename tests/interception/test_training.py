"""In training the operators run, keep less and give close gradients; elsewhere the model is untouched."""

from __future__ import annotations

import types
from typing import Any, cast

import pytest
import torch

Toy = types.SimpleNamespace


def test_training_keeps_less_and_gives_close_gradients(toy: Toy) -> None:
    stock, ours = toy.make(), toy.make()
    toy.attach(ours)
    expected_output, expected = toy.step(stock, toy.batch())
    output, gradients = toy.step(ours, toy.batch())
    assert torch.equal(output, expected_output)
    assert 0 < toy.relative_error(gradients, expected) < 0.2
    assert toy.saved_bytes(ours, toy.batch()) < toy.saved_bytes(stock, toy.batch()) / 4


def test_more_bits_are_closer(toy: Toy) -> None:
    _, expected = toy.step(toy.make(), toy.batch())
    errors = []
    for bits in (1, 2, 4, 8):
        model = toy.make()
        toy.attach(model, bits)
        errors.append(toy.relative_error(toy.step(model, toy.batch())[1], expected))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


def test_without_bits_gradients_are_those_of_torch(toy: Toy) -> None:
    stock, ours = toy.make(), toy.make()
    toy.attach(ours, bits=None)
    expected_output, expected = toy.step(stock, toy.batch())
    output, gradients = toy.step(ours, toy.batch())
    assert torch.equal(output, expected_output)
    toy.assert_same(gradients, expected)
    assert toy.saved_bytes(ours, toy.batch()) < toy.saved_bytes(
        stock, toy.batch()
    )  # ReLU and dropout are exact in one bit


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference", "disabled", "detached"])
def test_elsewhere_the_model_is_untouched(toy: Toy, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_s2a import interception

    stock, ours = toy.make(), toy.make()
    interceptor = toy.attach(ours)
    entered: list[object] = []
    monkeypatch.setattr(interception.ActivationMode, "__enter__", lambda self: entered.append(self))
    if how == "eval":
        stock.eval(), ours.eval()
    elif how == "disabled":
        cast(Any, interceptor.layer).disable_adapters = True
    elif how == "detached":
        interceptor.detach()
    if how in ("no_grad", "inference"):
        with torch.no_grad() if how == "no_grad" else torch.inference_mode():
            torch.manual_seed(0)
            expected = stock(toy.batch())
            torch.manual_seed(0)
            assert torch.equal(ours(toy.batch()), expected)
    else:
        assert toy.saved_bytes(ours, toy.batch()) == toy.saved_bytes(stock, toy.batch())
        expected_output, expected_gradients = toy.step(stock, toy.batch())
        output, gradients = toy.step(ours, toy.batch())
        assert torch.equal(output, expected_output)
        toy.assert_same(gradients, expected_gradients)
    assert not entered


def test_two_forwards_before_one_backward(toy: Toy) -> None:
    model = toy.make()
    toy.attach(model)
    model.blocks[0].dropout.p = model.blocks[1].dropout.p = 0.0
    _, first = toy.step(model, toy.batch(1))
    _, second = toy.step(model, toy.batch(2))
    model.zero_grad()
    (model(toy.batch(1)).square().sum() + model(toy.batch(2)).square().sum()).backward()
    together = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    toy.assert_same(together, {n: first[n] + second[n] for n in first}, 1e-4)


def test_retained_graph(toy: Toy) -> None:
    model = toy.make()
    toy.attach(model)
    loss = model(toy.batch()).square().sum()
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    toy.assert_same(
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, {n: 2 * g for n, g in once.items()}
    )


def test_blocks_below_the_first_trained_tensor_keep_nothing(toy: Toy) -> None:
    model = toy.make()
    toy.attach(model)
    model.requires_grad_(False)
    model.head.bias.requires_grad_(True)
    assert toy.saved_bytes(model, toy.batch()) == 0
