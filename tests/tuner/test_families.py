"""Every family: found by structure, identity at the start, every parameter trained, saved and loaded."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import nn

from peft_s2a import BlockShape
from peft_s2a.tuner.discovery import find_heads


def test_fresh_adapter_is_the_identity(family, run, adapt):
    model, images = family.make().eval(), family.images()
    names = [name for name, _ in model.named_modules()]
    classes = {name: type(module) for name, module in model.named_modules()}
    with torch.no_grad():
        expected = run(model, images)
    adapted = adapt(model, family.head)
    torch.testing.assert_close(run(adapted, images), expected, rtol=1e-5, atol=1e-6)

    shapes = adapted.peft_config["default"].block_shapes
    assert shapes
    assert {shape["layout"] for shape in shapes.values()} == {family.layout}
    for name in shapes:
        assert name in names
        assert type(adapted.base_model.model.get_submodule(name)) is classes[name]


def test_head_is_found(family):
    assert find_heads(family.make()) == ([family.head] if family.head else [])


@pytest.mark.parametrize("bits", [None, 4])
def test_every_parameter_gets_a_gradient(family, run, adapt, bits):
    model = adapt(family.make(), family.head, activation_bits=bits).train()
    base = {k: v.clone() for k, v in model.state_dict().items() if "s2a_" not in k and "modules_to_save" not in k}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output = run(model, family.images())
        (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        optimizer.step()
    without = [name for name, p in trainable.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [name for name in without if not any(part in name for part in family.unused)] == []
    for key, value in base.items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0, msg=key)


def test_round_trip(family, run, adapt, trained, tmp_path):
    torch.manual_seed(3)
    model = family.make().eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    adapted = trained(adapt(model, family.head, activation_bits=4))
    expected = run(adapted, family.images()).detach()
    adapted.save_pretrained(tmp_path)

    base = family.make().eval()
    base.load_state_dict(state)
    assert not torch.allclose(run(base, family.images()), expected, atol=1e-4)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(run(loaded, family.images()), expected)


def test_unload_gives_the_model_back(family, run, adapt, trained):
    model = family.make().eval()
    expected = run(model, family.images()).detach()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    back = trained(adapt(model, family.head)).unload()
    assert [name for name, _ in back.named_modules()] == names
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in back.named_modules()} == hooks
    assert not [name for name in vars(back) if "s2a" in name]
    torch.testing.assert_close(dict(back.state_dict()), state, rtol=0, atol=0)
    torch.testing.assert_close(run(back, family.images()), expected)


@pytest.mark.parametrize(
    ("name", "num_extra", "grids"),
    [
        ("hf-vit", 1, [(4, 4), (4, 4)]),
        ("hf-deit", 2, [(4, 4), (4, 4)]),
        ("hf-dinov2-registers", 5, [(4, 4), (4, 4)]),
        ("hf-siglip-vision", 0, [(4, 4), (4, 4)]),
        ("hf-swin", 0, [(8, 8), (4, 4), (4, 4)]),
        ("timm-swin", 0, [(8, 8), (4, 4), (4, 4)]),
        ("hf-resnet", 0, [(56, 56), (56, 56), (28, 28)]),
        ("timm-vit", 1, [(4, 4), (4, 4)]),
        ("torchvision-vit", 1, [(4, 4), (4, 4)]),
    ],
)
def test_shapes_of_blocks(families, adapt, name, num_extra, grids):
    model = adapt(families[name].make(), families[name].head)
    shapes = [BlockShape.from_dict(shape) for shape in model.peft_config["default"].block_shapes.values()]
    assert [shape.grid for shape in shapes] == grids
    assert {shape.num_extra for shape in shapes} == {num_extra}


def test_vit_base_trains_at_most_0_9_percent(adapt):
    import transformers as T

    with torch.device("meta"):
        model = T.ViTForImageClassification(T.ViTConfig(num_labels=10))
    head = sum(p.numel() for p in model.classifier.parameters())
    adapted = adapt(model)
    trainable, total = adapted.get_nb_trainable_parameters()
    assert (trainable - head) / (total - 2 * head) <= 0.009


def test_an_unseen_family(run, adapt):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, *, hidden):
            return (hidden + self.down(self.up(self.norm(hidden)).relu()), None)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 32, 32)
            self.body = nn.ModuleList(Block() for _ in range(2))
            self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 3)

        def forward(self, x):
            x = self.stem(x).flatten(2).mT
            for block in self.body:
                x, _ = block(hidden=x)
            return self.out(self.norm(x).mean(1))

    model, images = Net().eval(), torch.randn(2, 3, 64, 32)
    expected = run(model, images).detach()
    adapted = adapt(model, "out")
    torch.testing.assert_close(run(adapted, images), expected)
    assert set(adapted.peft_config["default"].block_shapes) == {"body.0", "body.1"}
