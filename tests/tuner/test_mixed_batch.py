"""`adapter_names`: each item of a batch has its own adapter, in inference, as LoRA offers it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_s2a import S2AConfig

NAMES = ["__base__", "default", "other", "default", "other", "__base__"]


def with_two_adapters(family, adapt, trained, **fields):
    model = adapt(family.make(), family.head, **fields)
    model.add_adapter("other", S2AConfig(modules_to_save=[family.head], activation_bits=None, **fields))
    trained(model), trained(model, "other", 0.3)
    return model.eval()


def check(model, run, images):
    expected = torch.empty_like(run(model, images))
    for name in dict.fromkeys(NAMES):
        items = [place for place, other in enumerate(NAMES) if other == name]
        if name == "__base__":
            with model.disable_adapter():
                expected[items] = run(model, images[items])
        else:
            model.set_adapter(name)
            expected[items] = run(model, images[items])
    output = run(model, images, adapter_names=NAMES)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output, run(model, images), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["hf-vit", "hf-convnext", "timm-vit", "timm-convnext", "timm-efficientnet"])
def test_each_item_has_the_output_of_its_adapter(families, run, adapt, trained, name):
    family = families[name]
    torch.manual_seed(0)
    check(with_two_adapters(family, adapt, trained), run, family.images(batch=6))


@torch.no_grad()
def test_parts_alone_and_on_different_layers(families, run, adapt, trained):
    family = families["hf-vit"]
    for fields in ({"use_bias": False}, {"prompt_rank": 0, "side_reduction": 0}):
        check(with_two_adapters(family, adapt, trained, **fields), run, family.images(batch=6))
    model = adapt(family.make(), family.head, target_modules=["fc1"], block_modules=["layers.0"])
    other = S2AConfig(target_modules=["fc2"], block_modules=["layers.1"], modules_to_save=["classifier"])
    model.add_adapter("other", other)
    trained(model), trained(model, "other", 0.3)
    check(model.eval(), run, family.images(batch=6))


class GatedNorm(nn.LayerNorm):
    """A norm with something behind its bias: it is called once for each adapter."""

    def forward(self, features: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        normal = super().forward(features)
        return normal.relu() if gate is None else normal.relu() * gate


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm, self.head = nn.Linear(4, 8), GatedNorm(8), nn.Linear(8, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.lin(input=images)
        return self.head(self.norm(gate=images[:, :1], features=features))


@torch.no_grad()
def test_layers_that_are_called_by_keyword(run, adapt, trained):
    torch.manual_seed(0)
    fields = {"target_modules": ["lin", "norm"], "prompt_rank": 0, "side_reduction": 0}
    model = adapt(ByKeyword(), "head", **fields)
    model.add_adapter("other", S2AConfig(modules_to_save=["head"], activation_bits=None, **fields))
    trained(model), trained(model, "other", 0.3)
    check(model.eval(), run, torch.randn(6, 4))


def test_what_cannot_be_mixed(families, run, adapt, trained):
    family = families["hf-vit"]
    model, images = with_two_adapters(family, adapt, trained, prompt_rank=0, side_reduction=0), family.images(batch=6)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
        run(model, images, adapter_names=NAMES[:3])
    with pytest.raises(ValueError, match="non-existing adapter.s.: nobody"):
        run(model, images, adapter_names=["nobody"] * 6)
    with pytest.raises(ValueError, match="in training mode"):
        run(model.train(), images, adapter_names=NAMES)
    model.eval().merge_adapter(["default"])
    with pytest.raises(ValueError, match="merged adapters, please call `unmerge_adapter`"):
        run(model, images, adapter_names=NAMES)
    model.unmerge_adapter()
    run(model, images, adapter_names=NAMES)
    run(model, images)  # nothing is left of the names


def test_layers_that_refuse(families, run, adapt, trained):
    torchvision = families["torchvision-vit"]
    model = with_two_adapters(torchvision, adapt, trained)
    with pytest.raises(ValueError, match="MultiheadAttention does not support mixed adapter batches"):
        run(model, torchvision.images(batch=6), adapter_names=NAMES)
    swin = families["hf-swin"]
    model = with_two_adapters(swin, adapt, trained)
    with pytest.raises(ValueError, match="such as windows, cannot mix adapters"):
        run(model, swin.images(batch=6), adapter_names=NAMES)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    fields = {"prompt_rank": 0, "side_reduction": 0, "train_batch_norm": True}
    model = adapt(net, "3", **fields)
    with pytest.raises(ValueError, match="train_batch_norm=True cannot be mixed"):
        model(torch.randn(2, 3, 8, 8), adapter_names=["default", "__base__"])
