"""Full-size vision models by name, with random weights, and the batches they take: no download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.results import REHEARSAL

NUM_CLASSES = 10
IMAGE_SIZE = 64 if REHEARSAL else 224


@dataclass(frozen=True)
class BenchmarkModel:
    """A model with a classification head.

    Attributes:
        module: the model, float32, on the CPU, in eval mode.
        heads: paths of the layers that give the class scores.
        from_transformers: whether it takes `pixel_values` and `labels` and returns a loss; else it takes a tensor.
    """

    module: nn.Module
    heads: list[str]
    from_transformers: bool

    def batch(self, size: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor] | Tensor:
        """`size` random images (with labels, if the model takes them), the same at every call."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(dtype)
        if not self.from_transformers:
            return images
        return {"pixel_values": images, "labels": torch.arange(size) % NUM_CLASSES}


def _transformers(name: str, config_name: str, heads: list[str], **config: Any) -> BenchmarkModel:
    import transformers

    if REHEARSAL:
        config |= REHEARSED[config_name]
    settings = getattr(transformers, config_name)(num_labels=NUM_CLASSES, **config)
    return BenchmarkModel(getattr(transformers, name)(settings), heads, from_transformers=True)


def _clip(**vision: Any) -> BenchmarkModel:
    from transformers import CLIPConfig, CLIPForImageClassification

    config = CLIPConfig(vision_config=vision, num_labels=NUM_CLASSES)
    return BenchmarkModel(CLIPForImageClassification(config), ["classifier"], from_transformers=True)


def _siglip(**vision: Any) -> BenchmarkModel:
    from transformers import SiglipConfig, SiglipForImageClassification

    config = SiglipConfig(vision_config=vision, num_labels=NUM_CLASSES)
    return BenchmarkModel(SiglipForImageClassification(config), ["classifier"], from_transformers=True)


def _timm(name: str, head: str) -> BenchmarkModel:
    import timm

    return BenchmarkModel(timm.create_model(name, pretrained=False, num_classes=NUM_CLASSES), [head], False)


def _torchvision(name: str, head: str) -> BenchmarkModel:
    import torchvision

    return BenchmarkModel(torchvision.models.get_model(name, weights=None, num_classes=NUM_CLASSES), [head], False)


REHEARSED: dict[str, dict[str, Any]] = {
    "ViTConfig": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "image_size": IMAGE_SIZE,
    },
    "ResNetConfig": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]},
}
"""Sizes in a rehearsal, of the models that are used there."""

_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_SWIN_B = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 7}
_CONVNEXT_B = {"depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]}
_DINOV2_L = {key: value for key, value in _LARGE.items() if key != "intermediate_size"}
_DINOV2_B = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 14,
    "image_size": IMAGE_SIZE,
}

BUILDERS: dict[str, Callable[[], BenchmarkModel]] = {
    "vit_b16": lambda: _transformers("ViTForImageClassification", "ViTConfig", ["classifier"]),
    "deit_b16": lambda: _transformers("DeiTForImageClassification", "DeiTConfig", ["classifier"]),
    "beit_b16": lambda: _transformers(
        "BeitForImageClassification", "BeitConfig", ["classifier"], use_relative_position_bias=True
    ),
    "dinov2_b": lambda: _transformers("Dinov2ForImageClassification", "Dinov2Config", ["classifier"], **_DINOV2_B),
    "dinov2_l": lambda: _transformers(
        "Dinov2ForImageClassification",
        "Dinov2Config",
        ["classifier"],
        image_size=IMAGE_SIZE,
        patch_size=14,
        **_DINOV2_L,
    ),
    "dinov2_b_reg": lambda: _transformers(
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        ["classifier"],
        num_register_tokens=4,
        **_DINOV2_B,
    ),
    "clip_vit_l14": lambda: _clip(patch_size=14, image_size=IMAGE_SIZE, projection_dim=768, **_LARGE),
    "siglip_b16": lambda: _siglip(patch_size=16, image_size=IMAGE_SIZE, **_BASE),
    "swin_b": lambda: _transformers("SwinForImageClassification", "SwinConfig", ["classifier"], **_SWIN_B),
    "swinv2_b": lambda: _transformers("Swinv2ForImageClassification", "Swinv2Config", ["classifier"], **_SWIN_B),
    "resnet50": lambda: _transformers("ResNetForImageClassification", "ResNetConfig", ["classifier.1"]),
    "convnext_b": lambda: _transformers(
        "ConvNextForImageClassification", "ConvNextConfig", ["classifier"], **_CONVNEXT_B
    ),
    "efficientnet_b0": lambda: _timm("efficientnet_b0", "classifier"),
    "timm_vit_l16": lambda: _timm("vit_large_patch16_224", "head"),
    "timm_swin_b": lambda: _timm("swin_base_patch4_window7_224", "head.fc"),
    "timm_resnet50": lambda: _timm("resnet50", "fc"),
    "timm_convnext_b": lambda: _timm("convnext_base", "head.fc"),
    "torchvision_vit_b16": lambda: _torchvision("vit_b_16", "heads.head"),
}
"""Every model of the benchmarks."""


def build(name: str, seed: int = 0) -> BenchmarkModel:
    """The model called `name`, the same weights for the same `seed`.

    Raises:
        ValueError: for a name that is not in `BUILDERS`.
    """
    if name not in BUILDERS:
        raise ValueError(f"no model {name!r}: choose from {', '.join(BUILDERS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = BUILDERS[name]()
    built.module.eval()
    return built
