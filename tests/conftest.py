"""Tiny models of every family the library is made for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 2}
RESNET_WIDTHS = {"channels": [8, 8, 16, 16]}


@dataclass(frozen=True)
class Family:
    """A tiny model: how it is made, the name of its head, and the size of its images."""

    make: Callable[[], nn.Module]
    head: str | None = "classifier"
    image_size: int = 32
    layout: str = "tokens"
    unused: tuple[str, ...] = ()  # layers behind an output that the tests' loss does not use

    def images(self, batch: int = 2, size: int | tuple[int, int] | None = None) -> torch.Tensor:
        size = size or self.image_size
        height, width = size if isinstance(size, tuple) else (size, size)
        return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def _timm(name: str, **options: Any) -> nn.Module:
    """A model of timm; the test is skipped where timm is not installed."""
    return pytest.importorskip("timm").create_model(name, num_classes=3, **options)


def _timm_wrapper() -> nn.Module:
    pytest.importorskip("timm")
    config = T.TimmWrapperConfig(architecture="resnet18", model_args=RESNET_WIDTHS, num_labels=3)
    return T.TimmWrapperForImageClassification(config)


def _clip() -> nn.Module:
    return T.CLIPForImageClassification(T.CLIPConfig(vision_config=T.CLIPVisionConfig(**VIT).to_dict(), num_labels=3))


def _resnet_config() -> T.ResNetConfig:
    return T.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=3)


def _convnext_config() -> T.ConvNextConfig:
    return T.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 2], num_stages=2, num_labels=3, image_size=32)


def _timm_vit() -> nn.Module:
    return _timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)


def _timm_swin() -> nn.Module:
    sizes = {"img_size": 32, "window_size": 2, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 2)}
    return _timm("swin_tiny_patch4_window7_224", **sizes)


def _torchvision_vit() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=3
    )
    nn.init.normal_(model.heads.head.weight, std=0.1)  # zero at the start: no gradient would reach the adapter
    return model


UNUSED_POOLER = ("head.attention", "head.layernorm", "head.mlp")

FAMILIES = {
    "hf-vit": Family(lambda: T.ViTForImageClassification(T.ViTConfig(**VIT, num_labels=3))),
    "hf-deit": Family(lambda: T.DeiTForImageClassification(T.DeiTConfig(**VIT, num_labels=3))),
    "hf-beit": Family(lambda: T.BeitForImageClassification(T.BeitConfig(**VIT, num_labels=3))),
    "hf-dinov2": Family(lambda: T.Dinov2ForImageClassification(T.Dinov2Config(**VIT, num_labels=3))),
    "hf-dinov2-registers": Family(
        lambda: T.Dinov2WithRegistersForImageClassification(T.Dinov2WithRegistersConfig(**VIT, num_labels=3))
    ),
    "hf-clip": Family(_clip),
    "hf-clip-vision": Family(
        lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**VIT)), head=None, unused=("post_layernorm",)
    ),
    "hf-siglip-vision": Family(
        lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**VIT)), head=None, unused=UNUSED_POOLER
    ),
    "hf-swin": Family(lambda: T.SwinForImageClassification(T.SwinConfig(**SWIN, num_labels=3))),
    "hf-swinv2": Family(lambda: T.Swinv2ForImageClassification(T.Swinv2Config(**SWIN, num_labels=3))),
    "hf-resnet": Family(
        lambda: T.ResNetForImageClassification(_resnet_config()), image_size=64, layout="channels_first"
    ),
    "hf-convnext": Family(lambda: T.ConvNextForImageClassification(_convnext_config()), layout="channels_first"),
    "hf-timm-wrapper": Family(_timm_wrapper, head="timm_model.fc", image_size=64, layout="channels_first"),
    "timm-vit": Family(_timm_vit, head="head"),
    "timm-swin": Family(_timm_swin, head="head.fc", layout="channels_last"),
    "timm-resnet": Family(
        lambda: _timm("resnet18", **RESNET_WIDTHS, layers=[1, 1, 1, 1], zero_init_last=False),
        head="fc",
        image_size=64,
        layout="channels_first",
    ),
    "timm-convnext": Family(
        lambda: _timm("convnext_tiny", dims=(16, 16, 32, 32), depths=(1, 2, 1, 1)),
        head="head.fc",
        image_size=64,
        layout="channels_first",
    ),
    "timm-efficientnet": Family(lambda: _timm("efficientnet_b0"), image_size=64, layout="channels_first"),
    "torchvision-vit": Family(_torchvision_vit, head="heads"),
}


@pytest.fixture
def families() -> dict[str, Family]:
    """Every family by name."""
    return FAMILIES


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    """Each family in turn."""
    torch.manual_seed(0)
    return FAMILIES[request.param]
