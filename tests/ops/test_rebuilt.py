"""Operators that make their input again in backward, from a normalised input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_s2a.mode import ActivationMode
from peft_s2a.ops import attention, rebuilt
from peft_s2a.settings import REBUILT_KINDS, ActivationSettings

B, L, D = 4, 16, 128


def weights(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def mlp(x: Tensor, bias: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return F.linear(function(F.linear(F.layer_norm(x, (D,)), weights(4 * D, D), bias)), weights(D, 4 * D))


def gated(x: Tensor, bias: Tensor) -> Tensor:
    y = F.rms_norm(x, (D,))
    gate, up = F.silu(F.linear(y, weights(4 * D, D), bias)), F.linear(y, weights(4 * D, D, seed=4))
    return F.linear(gate * up, weights(D, 4 * D))


def heads(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    y = F.layer_norm(x, (D,))
    q = F.linear(y, weights(D, D), bias[:D])
    k, v = (F.linear(y, weights(D, D, seed=seed)) for seed in (4, 5))
    return tuple(t.view(B, L, 4, -1).transpose(1, 2) for t in (q, k, v))


def fused(x: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*heads(x, bias)).transpose(1, 2).flatten(2)


def eager(x: Tensor, bias: Tensor) -> Tensor:
    q, k, v = heads(x, bias)
    return (torch.softmax(q @ k.mT * 32**-0.5, -1) @ v).transpose(1, 2).flatten(2)


def cross(x: Tensor, bias: Tensor) -> Tensor:
    q, k, _ = heads(x, bias)
    return F.scaled_dot_product_attention(q, k, x.view(B, L, 4, -1).transpose(1, 2))  # v has no lineage


WAYS = {
    "gelu": lambda x, b: mlp(x, b, F.gelu),
    "gelu, tanh": lambda x, b: mlp(x, b, lambda h: F.gelu(h, approximate="tanh")),
    "silu": lambda x, b: mlp(x, b, F.silu),
    "tanh": lambda x, b: mlp(x, b, torch.tanh),
    "quick gelu": lambda x, b: mlp(x, b, lambda h: h * torch.sigmoid(1.702 * h)),
    "gated": gated,
    "attention": fused,
    "eager attention": eager,
    "attention with other values": cross,
}


def step(function: Callable[..., Tensor], x: Tensor, bias: Tensor, **settings: object) -> tuple[list[Tensor], int]:
    """Output and gradients, and the bytes that were kept."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if settings:
            with ActivationMode(ActivationSettings.from_config(**settings)):  # type: ignore[arg-type]
                output = function(x, bias)
        else:
            output = function(x, bias)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(output, (x, bias), grad)
    return [output.detach(), *found], sum(kept.values())


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("name", list(WAYS))
def test_gradients_are_those_of_torch_up_to_the_codes_of_the_normalised_input(leaf, monkeypatch, name, pieces):
    if pieces:
        monkeypatch.setattr(rebuilt, "CPU_CHUNK", 1)
        monkeypatch.setattr(attention, "CPU_CHUNK", 1)
    x, bias = leaf(B, L, D), leaf(4 * D)
    (output, *exact), _ = step(WAYS[name], x, bias)
    (same, *found), _ = step(WAYS[name], x, bias, activation_bits=8, activation_policy="rebuild")
    torch.testing.assert_close(same, output, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("name", ["gelu", "gated", "attention"])
def test_less_is_kept_than_in_codes(leaf, name):
    x, bias = leaf(B, L, D), leaf(4 * D)
    _, codes = step(WAYS[name], x, bias, activation_bits={"norm": 8})
    _, kept = step(WAYS[name], x, bias, activation_bits=4, activation_policy="rebuild")
    constants = sum(t.numel() * 4 for t in (weights(4 * D, D), bias)) * (2 if name == "gated" else 1)
    assert kept - constants < codes
    made_again = 4 * B * L * D * {"gelu": 4, "gated": 8, "attention": 3}[name] // 8  # at 4 bits
    assert kept <= codes - made_again + constants + 4 * D * D * 4


def test_a_kind_alone(leaf):
    x, bias = leaf(B, L, D), leaf(4 * D)

    def block(x: Tensor, bias: Tensor) -> Tensor:
        return mlp(x + fused(x, bias), bias, F.gelu)

    sizes = {}
    for kinds in ((), ("gelu",), ("attention",), ("gelu", "attention")):
        policy = dict.fromkeys(kinds, "rebuild")
        _, sizes[kinds] = step(block, x, bias, activation_bits={"norm": 8}, activation_policy=policy)
    assert sizes["gelu", "attention"] < sizes["gelu",] < sizes[()]
    assert sizes["gelu", "attention"] < sizes["attention",] < sizes[()]


def test_rebuilt_in_bfloat16_and_under_autocast(leaf):
    x, bias = leaf(B, L, D), leaf(4 * D)
    (_, *exact), _ = step(WAYS["gelu"], x, bias)
    with torch.autocast("cpu", torch.bfloat16):
        (output, *found), _ = step(WAYS["gelu"], x, bias, activation_bits=8, activation_policy="rebuild")
    assert output.dtype == torch.bfloat16
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_two_backwards_over_one_graph(leaf):
    x, bias = leaf(B, L, D), leaf(4 * D)
    with ActivationMode(ActivationSettings.from_config(4, activation_policy="rebuild")):
        output = WAYS["gelu"](x, bias)
    first = torch.autograd.grad(output.sum(), (x, bias), retain_graph=True)
    second = torch.autograd.grad(output.sum(), (x, bias))
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_policies_are_checked():
    settings = ActivationSettings.from_config(4, activation_policy="rebuild")
    assert settings.rebuilt == frozenset(REBUILT_KINDS)
    assert settings.bits["source"] == 8
    for policy, words in [
        ("forget", "not one of keep, rebuild, recompute"),
        ({"gelu": "recompute"}, "can be 'keep' or 'rebuild'"),
        ({"norm": "rebuild"}, "unknown kind 'norm'"),
        ({"block": "rebuild"}, "can be 'keep' or 'recompute'"),
    ]:
        with pytest.raises(ValueError, match=words):
            ActivationSettings.from_config(4, activation_policy=policy)
