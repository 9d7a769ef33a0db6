"""What the tests of the tuner share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_s2a import S2AConfig


def features(model: nn.Module, images: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The model's main output as a tensor."""
    output = model(images, **kwargs)
    if isinstance(output, torch.Tensor):
        return output
    return output.logits if "logits" in output else output.last_hidden_state


def disturb(model: nn.Module, adapter_name: str = "default", scale: float = 0.1) -> nn.Module:
    """Moves every parameter of an adapter away from its start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "s2a_" in name and name.endswith(f".{adapter_name}"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


@pytest.fixture
def run() -> Callable[..., torch.Tensor]:
    return features


@pytest.fixture
def trained() -> Callable[..., nn.Module]:
    return disturb


@pytest.fixture
def adapt() -> Callable[..., PeftModel]:
    """Adapts a model; the head is named, activations are exact unless `activation_bits` is given."""

    def make(model: nn.Module, head: str | None = "classifier", **fields: Any) -> PeftModel:
        fields.setdefault("modules_to_save", [head] if head else None)
        fields.setdefault("activation_bits", None)
        return get_peft_model(model, S2AConfig(**fields)).eval()

    return make
