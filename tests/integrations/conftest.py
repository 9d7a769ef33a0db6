"""What the tests of the integrations share: a tiny ViT with dropout under an adapter, and images of three classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from peft import PeftModel, get_peft_model

from peft_s2a import S2AConfig


def make_adapted_vit(**fields: Any) -> PeftModel:
    """The same model at every call."""
    torch.manual_seed(0)
    config = T.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=3,
        hidden_dropout_prob=0.1,
    )
    fields.setdefault("modules_to_save", ["classifier"])
    return get_peft_model(T.ViTForImageClassification(config), S2AConfig(**fields))


@pytest.fixture
def adapted_vit() -> Callable[..., PeftModel]:
    return make_adapted_vit


@pytest.fixture
def samples() -> list[dict[str, Any]]:
    """24 images whose class is their brightness."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(24, 3, 32, 32, generator=generator)
    return [{"pixel_values": image + i % 3 - 1, "labels": i % 3} for i, image in enumerate(images)]
