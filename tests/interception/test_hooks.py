"""Hooks of others, exceptions, and copies of a model."""

from __future__ import annotations

import pickle
import types
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.overrides import _len_torch_function_stack

Toy = types.SimpleNamespace


def test_hooks_of_others_still_run_and_see_the_same_values(toy: Toy) -> None:
    stock, ours = toy.make(), toy.make()
    seen: dict[str, list[Tensor]] = {"stock": [], "ours": []}
    for name, model in (("stock", stock), ("ours", ours)):
        for module in (model, model.blocks[0], model.blocks[0].norm1):
            module.register_forward_pre_hook(lambda m, a, n=name: seen[n].append(a[0].detach()))
            module.register_forward_hook(lambda m, a, o, n=name: seen[n].append(o.detach()))
        if name == "ours":
            toy.attach(model)
        model.register_forward_hook(lambda m, a, o, n=name: seen[n].append(o.detach()))
        model.blocks[1].register_full_backward_hook(lambda m, gi, go, n=name: seen[n].append(torch.zeros(())))
    toy.step(stock, toy.batch())
    toy.step(ours, toy.batch())
    assert len(seen["ours"]) == len(seen["stock"]) == 8
    for our, their in zip(seen["ours"], seen["stock"], strict=True):
        assert torch.equal(our, their)


def test_saved_tensor_hooks_of_others_see_the_packed_tensors(toy: Toy) -> None:
    model = toy.make()
    toy.attach(model)
    _, expected = toy.step(model, toy.batch())
    dtypes: list[torch.dtype] = []

    def pack(tensor: Tensor) -> Tensor:
        dtypes.append(tensor.dtype)
        return tensor.clone()

    with saved_tensors_hooks(pack, lambda t: t):
        _, gradients = toy.step(model, toy.batch())
    assert torch.uint8 in dtypes
    toy.assert_same(gradients, expected)
    with save_on_cpu():
        _, gradients = toy.step(model, toy.batch())
    toy.assert_same(gradients, expected)


@pytest.mark.parametrize(
    "where",
    [
        "inside",
        "pre_hook",
        "post_hook",
    ],
)
def test_an_exception_leaves_no_mode_behind(toy: Toy, where: str) -> None:
    model = toy.make()
    toy.attach(model)
    _, expected = toy.step(model, toy.batch())

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    target = model.blocks[1]
    if where == "inside":
        handle = target.down.register_forward_hook(fail)
    elif where == "pre_hook":
        handle = target.register_forward_pre_hook(fail, prepend=True)
    else:
        handle = target.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(toy.batch())
    assert _len_torch_function_stack() == 0
    handle.remove()
    _, gradients = toy.step(model, toy.batch())
    toy.assert_same(gradients, expected)


@pytest.mark.parametrize("copy", [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_work_alone(toy: Toy, copy: Callable[[nn.Module], nn.Module]) -> None:
    model = toy.make()
    interceptor = toy.attach(model)
    model.with_mask = True
    _, expected = toy.step(model, toy.batch())
    twin = copy(model)
    interceptor.detach()
    exact = toy.step(model, toy.batch())[1]
    _, gradients = toy.step(twin, toy.batch())
    toy.assert_same(gradients, expected)
    assert toy.relative_error(exact, expected) > 0
    assert toy.saved_bytes(twin, toy.batch()) < toy.saved_bytes(model, toy.batch()) / 4
