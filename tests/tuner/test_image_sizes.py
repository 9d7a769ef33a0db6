"""Prompts at image sizes other than the one they were made for."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel


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


@pytest.mark.parametrize(
    ("name", "image_size", "grids", "options"),
    [
        ("hf-dinov2", 64, [[8, 8]], {}),
        ("hf-dinov2", (64, 16), [[8, 2]], {}),
        ("hf-vit", [48, 64], [[6, 8]], {"interpolate_pos_encoding": True}),
        ("hf-swin", 64, [[16, 16], [8, 8]], {}),
        ("hf-resnet", 64, [[16, 16], [8, 8]], {}),
    ],
)
def test_image_size_of_the_training(families, run, adapt, trained, tmp_path, name, image_size, grids, options):
    family = families[name]
    torch.manual_seed(0)
    base = family.make().eval()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = trained(adapt(base, image_size=image_size))
    shapes = model.peft_config["default"].block_shapes
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    found = [shape["grid"] for shape in shapes.values()]
    assert [grid for i, grid in enumerate(found) if grid not in found[:i]] == grids
    for key, shape in shapes.items():
        assert tuple(shape["image_size"]) == size
        prompt = model.base_model.model.get_submodule(key).s2a.s2a_prompt_a["default"]
        assert prompt.shape[0] == shape["num_extra"] + math.prod(shape["grid"])
    images = family.images(size=size)
    expected = run(model, images, **options).detach()
    for other in (family.image_size, 96):
        assert run(model, family.images(size=other), **options).isfinite().all()
    model.save_pretrained(tmp_path)
    fresh = family.make()
    fresh.load_state_dict(state)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert loaded.peft_config["default"].image_size == model.peft_config["default"].image_size
    torch.testing.assert_close(run(loaded, images, **options), expected)


def test_image_size_that_the_model_refuses(families, adapt):
    with pytest.raises(ValueError, match=r"image_size=\(32, 32, 32\) must be one number or 2"):
        adapt(families["hf-dinov2"].make(), image_size=(32, 32, 32))
    with pytest.raises(ValueError, match=r"shape \(3, 48, 48\): .*[Ii]nput"):
        adapt(families["timm-vit"].make(), "head", image_size=48)
