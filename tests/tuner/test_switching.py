"""Adapters that are deleted, made anew and switched: what is kept for backward goes with them."""

from __future__ import annotations

import pytest
import torch

from peft_s2a import S2AConfig
from peft_s2a.memory import saved_activation_bytes
from peft_s2a.tuner.attachments import interceptor


@pytest.fixture
def images(families):
    return families["hf-vit"].images(batch=4)


def config(bits, **fields):
    return S2AConfig(modules_to_save=["classifier"], activation_bits=bits, **fields)


@pytest.fixture
def vit(families):
    torch.manual_seed(0)
    return families["hf-vit"].make()


def test_switching_changes_what_is_kept(vit, images, adapt):
    model = adapt(vit, activation_bits=4)
    coded = saved_activation_bytes(model, images)
    model.add_adapter("exact", config(None))
    assert saved_activation_bytes(model, images) == coded
    model.set_adapter("exact")
    exact = saved_activation_bytes(model, images)
    assert coded < exact / 2
    model.set_adapter("default")
    assert saved_activation_bytes(model, images) == coded
    with model.disable_adapter():
        model.base_model.model.classifier.requires_grad_(True)
        assert interceptor(model.base_model.model).active_mode is None


def test_a_new_adapter_of_a_deleted_ones_name(vit, images, adapt):
    model = adapt(vit, activation_bits=4)
    coded = saved_activation_bytes(model, images)
    model.add_adapter("other", config(None))
    model.set_adapter("other")
    exact = saved_activation_bytes(model, images)
    model.delete_adapter("default")
    assert set(interceptor(model.base_model.model)._modes) == {"other"}
    model.add_adapter("default", config(None))
    model.set_adapter("default")
    assert saved_activation_bytes(model, images) == exact
    model.delete_adapter("other")
    model.add_adapter("other", config(4))
    model.set_adapter("other")
    assert saved_activation_bytes(model, images) == coded


@pytest.mark.filterwarnings("ignore:.*was active which is now deleted")
def test_deleting_the_active_adapter_activates_another_everywhere(vit, images, run, adapt, trained):
    model = adapt(vit, target_modules=["q_proj"], block_modules=["layers.0"], activation_bits=4)
    model.add_adapter("other", config(4, target_modules=["fc1"], block_modules=["layers.1"]))
    trained(model, "other")
    model.set_adapter("other")
    expected, kept = run(model, images), saved_activation_bytes(model, images)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    torch.testing.assert_close(run(model, images), expected)
    assert saved_activation_bytes(model, images) == kept
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("fc1.s2a_bias.other" in name for name in trainable)


def test_deleting_an_inactive_adapter_leaves_the_rest(vit, adapt):
    model = adapt(vit)
    model.add_adapter("other", config(4))
    model.requires_grad_(False)
    model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_last_adapter_can_go(vit, images, run, adapt, trained):
    expected = run(vit.eval(), images).detach()
    model = trained(adapt(vit))
    model.delete_adapter("default")
    assert not list(model.peft_config)
    torch.testing.assert_close(run(model.base_model, images), expected)
