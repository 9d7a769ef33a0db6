"""Rotary position embeddings: q and k are coded after them, their constants kept once."""

from __future__ import annotations

import types
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from peft_s2a import S2AConfig
from peft_s2a.interception import ActivationInterceptor
from peft_s2a.memory import coverage_report
from peft_s2a.settings import ActivationSettings

B, L, H, D = 4, 128, 4, 32
LAYERS = 3


def tables() -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(L), 100.0 ** (-torch.arange(0, D, 2) / D)).repeat(1, 2)
    return angles.sin(), angles.cos()


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1)


def language_model_style(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


def patches_only(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """DINOv3: class and register tokens stay as they are."""
    prefix, patches = x.split([5, L - 5], dim=-2)
    return torch.cat([prefix, language_model_style(patches, sin[5:], cos[5:])], -2)


def timm_style(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    return apply_rot_embed_cat(x, torch.cat([sin, cos], -1))


def rotate_every_second(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return x * cos + turned * sin


class Rotary(nn.Module):
    def __init__(self, rotate: Any) -> None:
        super().__init__()
        self.rotate = rotate
        self.shift = nn.Parameter(torch.zeros(H * D))
        self.qkv = nn.ModuleList(nn.Linear(H * D, 3 * H * D) for _ in range(LAYERS)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift
        sin, cos = tables()  # made in the forward, as models do
        for layer in self.qkv:
            q, k, v = layer(x).view(B, L, 3, H, D).permute(2, 0, 3, 1, 4)
            q, k = self.rotate(q, sin, cos), self.rotate(k, sin, cos)
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, H * D)
        return x


@pytest.mark.parametrize("rotate", [language_model_style, patches_only, timm_style, rotate_every_second])
def test_rotary_embeddings(rotate: Any) -> None:
    gradients = []
    for bits in (None, 8, 4):
        torch.manual_seed(0)
        model = Rotary(rotate)
        if bits is not None:
            interceptor = ActivationInterceptor()
            layer = types.SimpleNamespace(disable_adapters=False, active_adapters=["default"])
            interceptor.layer = cast(BaseTunerLayer, layer)
            interceptor.set_adapter_settings("default", ActivationSettings.from_config(bits))
            interceptor.attach(model)
        x = torch.randn(B, L, H * D, generator=torch.Generator().manual_seed(1))
        model(x).square().sum().backward()
        gradients.append(model.shift.grad)
        if bits is None:
            continue
        report = coverage_report(model, x)
        coded = sum(row.bytes for row in report.rows if row.rule == "coded")
        per_layer = 3 * B * H * (L * D * bits // 8 + D * 4)
        assert coded == LAYERS * per_layer  # q, k and v, nothing of what they were turned from
        in_full = sum(row.bytes for row in report.left_alone())
        copies = LAYERS * 2 if rotate is timm_style else 1  # timm cuts its table anew in every call here
        assert in_full <= copies * 2 * L * D * 4
    exact, eight, four = gradients
    assert float((eight - exact).norm() / exact.norm()) < 0.02
    assert float((four - exact).norm() / exact.norm()) < 0.2


def test_a_model_with_rotary_embeddings() -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 112, "patch_size": 14, "embed_dim": 96, "depth": 2, "num_heads": 3, "num_classes": 5}
    # this model uses the weight of its qkv layers without calling them
    config = S2AConfig(modules_to_save=["head"], image_size=112, exclude_modules=["qkv"])
    model = get_peft_model(timm.create_model("eva02_tiny_patch14_224", **sizes), config)
    images = torch.randn(4, 3, 112, 112)
    report = coverage_report(model, images)
    assert all(row.bytes < 70_000 for row in report.left_alone()), str(report)
    model.train()(images).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
