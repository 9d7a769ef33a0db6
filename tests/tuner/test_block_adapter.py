"""What the side branch is added to: the block's output is written over where nobody else sees it, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from peft import get_peft_model
from torch import nn

from peft_s2a import S2AConfig, blockwise
from peft_s2a.tuner import block as module

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}


def make_model(base: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    base = base or T.ViTForImageClassification(T.ViTConfig(**SIZES))
    torch.manual_seed(1)
    config = S2AConfig(init_weights=False, activation_bits=8, modules_to_save=["classifier"])
    return get_peft_model(base, config).train()  # type: ignore[arg-type]


def run(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    output = model(pixel_values=images, labels=torch.arange(4) % 3)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each sum that is made, whether the block's output was joined from pieces."""
    found: list[bool] = []
    add = module._add_side

    def recorded(total: torch.Tensor, side: torch.Tensor, joined: bool) -> torch.Tensor:
        found.append(joined)
        return add(total, side, joined)

    monkeypatch.setattr(module, "_add_side", recorded)
    return found


@pytest.mark.parametrize("pieces", [False, True])
def test_the_sum_is_the_same_in_either_memory(pieces: bool, ways: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(make_model())
    monkeypatch.setattr(blockwise, "CPU_PIECE", 1 if pieces else 1 << 30)
    ways.clear()
    logits, gradients = run(make_model())
    assert ways == [pieces] * 2
    torch.testing.assert_close(logits, expected[0])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=0.05, atol=1e-3)


def test_hooks_of_others_keep_what_they_saw(ways: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "CPU_PIECE", 1)
    base = T.ViTForImageClassification(T.ViTConfig(**SIZES))
    seen: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []

    def look(block: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen.append(output)
        copies.append(output.detach().clone())

    base.vit.layers[0].register_forward_hook(look)
    run(make_model(base))
    assert ways == [False, True]
    assert torch.equal(seen[-1], copies[-1])
