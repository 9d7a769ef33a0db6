"""Gradient checkpointing of transformers: the same gradients, in both of its ways."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import CheckpointFunction

from peft_s2a import S2AConfig
from peft_s2a.memory import saved_activation_bytes

# torch's own: in a checkpoint in a checkpoint (Swin), and in blocks below the adapter
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")

FIELDS = {
    "default": {},
    # nothing below the blocks is trained, and no prompt: the input of the first block needs no gradient
    "frozen-embeddings": {"prompt_rank": 0, "side_reduction": 0, "target_modules": ["fc1", "dense"]},
}


def gradients(model, run, images):
    model.zero_grad()
    torch.manual_seed(5)
    output = run(model, images)
    (output * torch.arange(1.0, 1 + output.shape[1])).square().sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=list(FIELDS))
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", ["hf-vit", "hf-swin", "hf-swinv2", "hf-dinov2", "hf-clip"])
def test_the_same_gradients(families, run, adapt, trained, name, bits, fields, use_reentrant):
    family = families[name]
    torch.manual_seed(0)
    model = trained(adapt(family.make(), activation_bits=bits, **fields)).train()
    images = family.images(batch=4)
    expected = gradients(model, run, images)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.testing.assert_close(gradients(model, run, images), expected)
    assert all(gradient is not None for gradient in expected.values())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_codes_are_used_in_the_recomputation(families, run, adapt, trained, use_reentrant):
    family = families["hf-vit"]
    torch.manual_seed(0)
    base = family.make()
    exact = trained(adapt(copy.deepcopy(base), activation_bits=None)).train()
    coded = trained(adapt(base, activation_bits=4)).train()
    images = family.images(batch=4)
    coded.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    one, other = gradients(exact, run, images), gradients(coded, run, images)
    key = next(key for key in one if key.endswith("layers.0.mlp.fc1.s2a_bias.default"))
    assert not torch.allclose(one[key], other[key], rtol=1e-4)
    torch.testing.assert_close(one[key], other[key], rtol=0.5, atol=0.5 * one[key].abs().max().item())


def test_checkpointing_keeps_less(families, adapt):
    family = families["hf-vit"]
    model = adapt(family.make())
    kept = saved_activation_bytes(model, family.images(batch=4))
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert saved_activation_bytes(model, family.images(batch=4)) < kept / 2


def test_blocks_below_the_adapter_are_not_run_again(families, run, adapt, monkeypatch):
    family = families["hf-vit"]
    model = adapt(family.make(), layers_to_transform=[1], prompt_rank=0, side_reduction=0).train()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    calls = []
    backward = CheckpointFunction.backward
    monkeypatch.setattr(CheckpointFunction, "backward", lambda *args: calls.append(1) or backward(*args))
    assert all(gradient is not None for gradient in gradients(model, run, family.images()).values())
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["hf-vit", "hf-swin"])
def test_checkpointing_switched_on_before_the_adapter(families, run, adapt, name):
    family = families[name]
    model = family.make()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model = adapt(model, **FIELDS["frozen-embeddings"]).train()
    assert all(gradient is not None for gradient in gradients(model, run, family.images()).values())


def test_checkpointing_of_an_adapter_by_transformers(families, run):
    family = families["hf-swin"]
    model = family.make()
    model.add_adapter(S2AConfig(modules_to_save=["classifier"]))
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    assert all(gradient is not None for gradient in gradients(model, run, family.images()).values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_stochastic_rounding_is_the_same_when_computed_again(families, run, adapt, reentrant):
    family = families["hf-vit"]
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adapt(family.make(), activation_bits=4, activation_rounding="stochastic").train()
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        found.append(gradients(model, run, family.images(batch=8)))
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name
