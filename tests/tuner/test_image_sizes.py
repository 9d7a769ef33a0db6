"""Prompts at image sizes other than the one they were made for."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("hf-vit", 48, {"interpolate_pos_encoding": True}),
        ("hf-vit", (48, 32), {"interpolate_pos_encoding": True}),
        ("hf-deit", (32, 64), {"interpolate_pos_encoding": True}),
        ("hf-dinov2", (64, 32), {}),
        ("hf-dinov2-registers", (40, 64), {}),
        ("hf-swin", (64, 32), {}),
        ("hf-swin", (36, 28), {}),
        ("hf-swinv2", 48, {}),
        ("hf-resnet", 96, {}),
        ("hf-resnet", (224, 64), {}),
        ("hf-convnext", (64, 96), {}),
        ("timm-efficientnet", 96, {}),
    ],
)
def test_other_sizes(families, run, adapt, trained, name, size, options):
    family = families[name]
    model = family.make().eval()
    images = family.images(size=size)
    expected = run(model, images, **options).detach()
    adapted = adapt(model, family.head)
    torch.testing.assert_close(run(adapted, images, **options), expected, rtol=1e-4, atol=1e-5)
    trained(adapted)
    output = run(adapted.train(), images, **options)
    output.sum().backward()
    assert not torch.allclose(output, expected, atol=1e-4)
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "prompt" in n)


def test_grid_follows_the_image_and_comes_back(families, run, adapt, trained):
    model = trained(adapt(families["hf-dinov2"].make(), use_bias=False, side_reduction=0))
    images = families["hf-dinov2"].images()
    expected = run(model, images)
    record = model.base_model.model.dinov2.encoder.layer[0].s2a.image_size
    run(model, families["hf-dinov2"].images(size=(64, 16)))
    assert record.current == (64, 16)
    torch.testing.assert_close(run(model, images), expected)


def test_non_square_pretraining_grid(run, adapt, trained):
    import transformers as T

    config = T.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=(32, 16),
        patch_size=8,
    )
    model = trained(adapt(T.ViTForImageClassification(config)))
    shape = model.peft_config["default"].block_shapes["vit.layers.0"]
    assert (shape["grid"], shape["num_extra"]) == ([4, 2], 1)
    assert run(model, torch.randn(2, 3, 32, 16)).shape == (2, 2)


def test_gradient_checkpointing_gives_the_same_gradients(families, run, adapt, trained):
    family = families["hf-vit"]
    model = trained(adapt(family.make())).train()
    run(model, family.images()).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    run(model, family.images()).sum().backward()
    assert expected
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])
