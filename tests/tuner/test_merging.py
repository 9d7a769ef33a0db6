"""Bias deltas merge exactly; what cannot be merged is refused before anything is touched."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from peft_s2a import S2AConfig

BIAS_ONLY = {"prompt_rank": 0, "side_reduction": 0}
MERGEABLE = ["hf-vit", "hf-beit", "hf-clip", "hf-swin", "hf-swinv2", "hf-resnet", "hf-convnext", "timm-efficientnet"]


def test_new_biases_are_announced(families, adapt):
    """A merged ResNet has biases that its class would drop when it is loaded."""
    for name, layers in (("hf-resnet", 12), ("hf-vit", 0)):
        model = adapt(families[name].make(), families[name].head, **BIAS_ONLY)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.merge_and_unload()
        messages = [str(w.message) for w in caught if "a bias that they were made without" in str(w.message)]
        assert len(messages) == bool(layers)
        assert all(f"gives {layers} layers" in message for message in messages)


@pytest.mark.filterwarnings("ignore:Merging gives:UserWarning")
@pytest.mark.parametrize("name", [*MERGEABLE, "torchvision-vit"])
def test_merge_and_unload_is_exact(families, run, adapt, trained, name):
    family = families[name]
    torch.manual_seed(0)
    base = family.make().eval()
    classes = {key: type(module) for key, module in base.named_modules()}
    model = trained(adapt(base, family.head, **BIAS_ONLY))
    expected = run(model, family.images()).detach()
    merged = model.merge_and_unload(safe_merge=True)
    assert {key: type(module) for key, module in merged.named_modules()} == classes
    assert not any("s2a" in key for key in merged.state_dict())
    torch.testing.assert_close(run(merged, family.images()), expected)


@pytest.mark.parametrize("name", ["hf-vit", "hf-resnet", "torchvision-vit"])
def test_unmerge_restores_the_base_bit_for_bit(families, run, adapt, trained, name):
    family = families[name]
    model = trained(adapt(family.make().to(torch.bfloat16), family.head, **BIAS_ONLY))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = family.images().to(torch.bfloat16)
    expected = run(model, images)
    model.merge_adapter()
    # nn.MultiheadAttention has another kernel for a layer that nothing is added to: bfloat16's rounding differs
    torch.testing.assert_close(run(model, images), expected, rtol=2e-2, atol=2e-2)
    assert any((value != before[key]).any() for key, value in model.state_dict().items() if key in before)
    model.unmerge_adapter()
    assert list(model.state_dict()) == list(before)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(run(model, images), expected)


def test_disabling_a_merged_adapter_unmerges_it(families, run, adapt, trained):
    family = families["hf-vit"]
    model = adapt(family.make(), None, **BIAS_ONLY, target_modules=["classifier", "fc1"])
    base = run(model, family.images()).detach()
    trained(model)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(run(model, family.images()), base)


@pytest.mark.parametrize(("fields", "part"), [({"side_reduction": 0}, "prompt"), ({"prompt_rank": 0}, "side branch")])
def test_prompt_and_side_branch_are_refused(families, adapt, trained, fields, part):
    model = trained(adapt(families["hf-vit"].make(), **fields))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=rf"{part} cannot be folded.*unload\(\)"):
            merge()
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_named_adapter_is_merged_beside_one_that_cannot_be(families, run, adapt, trained):
    model = adapt(families["hf-vit"].make())
    config = S2AConfig(modules_to_save=["classifier"], **BIAS_ONLY)
    model.add_adapter("biases", config)
    trained(model, "biases")
    model.set_adapter("biases")
    expected = run(model, families["hf-vit"].images())
    model.set_adapter("default")
    model.merge_adapter(adapter_names=["biases"])
    model.unmerge_adapter()
    model.set_adapter("biases")
    torch.testing.assert_close(run(model, families["hf-vit"].images()), expected)


@pytest.mark.filterwarnings("ignore:Merging gives:UserWarning")
def test_a_norm_without_a_bias_is_refused(adapt):
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 4))
    model = adapt(model, "2", target_modules=["0", "1"], **BIAS_ONLY)
    with pytest.raises(ValueError, match="RMSNorm has no bias that its forward would add"):
        model.merge_and_unload()
    assert not model.base_model.model[0].merged


def test_safe_merge_refuses_nan(families, adapt):
    model = adapt(families["hf-vit"].make(), **BIAS_ONLY)
    layer = model.base_model.model.vit.layers[0].mlp.fc1
    layer.s2a_bias["default"].data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
