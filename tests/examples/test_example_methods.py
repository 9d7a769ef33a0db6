"""Heads and LoRA targets are found by structure."""

from __future__ import annotations

import pytest
from transformers import AutoModelForImageClassification, ResNetConfig, SwinConfig, TimmWrapperConfig, ViTConfig

TINY = {
    "vit": ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, num_labels=5
    ),
    "swin": SwinConfig(embed_dim=16, depths=[1], num_heads=[2], image_size=32, patch_size=4, num_labels=5),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5),
    "timm": TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=5, model_args={"depth": 1, "img_size": 32, "embed_dim": 48}
    ),
}


@pytest.mark.parametrize(
    ("family", "head", "target"),
    [
        ("vit", "classifier", "q_proj"),
        ("swin", "classifier", "q_proj"),
        ("resnet", "classifier.1", "convolution"),
        ("timm", "timm_model.head", "attn.qkv"),
    ],
)
def test_head_and_targets(family: str, head: str, target: str) -> None:
    from methods import head_names, lora_targets

    model = AutoModelForImageClassification.from_config(TINY[family])
    assert head_names(model) == [head]
    targets = lora_targets(model)
    assert any(name.endswith(target) for name in targets)
    assert head not in targets


@pytest.mark.parametrize("family", TINY)
def test_linear_probe_trains_the_head_only(family: str) -> None:
    from methods import apply_method, head_names

    model = apply_method(AutoModelForImageClassification.from_config(TINY[family]), "linear_probe")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{head_names(model)[0]}.{kind}" for kind in ("weight", "bias")}


def test_unknown_method_is_refused() -> None:
    from methods import apply_method

    with pytest.raises(ValueError, match="choose from s2a"):
        apply_method(AutoModelForImageClassification.from_config(TINY["vit"]), "adapters")


@pytest.mark.parametrize(("text", "bits"), [("4", 4), ("none", None), ("exact", None), ('{"gelu": 2}', {"gelu": 2})])
def test_bits_are_read(text: str, bits: object) -> None:
    from methods import parse_bits

    assert parse_bits(text) == bits


@pytest.mark.parametrize("text", ["four", "2.5", "true", "[4]"])
def test_other_bits_are_refused(text: str) -> None:
    from methods import parse_bits

    with pytest.raises(ValueError, match="activation_bits"):
        parse_bits(text)
