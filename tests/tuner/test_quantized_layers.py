"""Layers whose weights are not plain: the ways in which bitsandbytes keeps and uses them, without the package."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft_s2a.tuner.plain_layers import is_quantized


class Codes(nn.Parameter):
    """Integers, with what they mean beside them; a plain copy lacks it."""

    scale: torch.Tensor

    def __deepcopy__(self, memo):
        made = type(self)(self.data.clone(), requires_grad=False)
        made.scale = self.scale
        return made


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale, bias):
        ctx.kept = weight, scale
        y = x @ (weight.to(x.dtype) * scale).T
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.kept
        return grad @ (weight.to(grad.dtype) * scale), None, None, grad.flatten(0, -2).sum(0)


class QuantizedLinear(nn.Linear):
    """A linear layer with 8-bit weights and a scale an output, in a function of its own."""

    @classmethod
    def of(cls, layer: nn.Linear) -> QuantizedLinear:
        made = cls(layer.in_features, layer.out_features, layer.bias is not None)
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        made.weight = Codes((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        made.weight.scale = scale
        made.bias = layer.bias
        return made

    def forward(self, x):
        return Product.apply(x, self.weight, self.weight.scale, self.bias)


def quantize(model: nn.Module, head: str) -> nn.Module:
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and not name.startswith(head):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantizedLinear.of(layer))
    return model.eval()


@pytest.mark.filterwarnings("ignore:Merging gives:UserWarning")
@pytest.mark.parametrize("name", ["hf-vit", "timm-swin", "hf-convnext"])
def test_on_quantized_weights(families, run, adapt, trained, name):
    family = families[name]
    torch.manual_seed(0)
    base, images = quantize(family.make(), family.head), family.images()
    assert any(is_quantized(module) for module in base.modules())
    expected = run(base, images).detach()
    torch.testing.assert_close(run(adapt(copy.deepcopy(base), family.head), images), expected, rtol=1e-4, atol=1e-5)
    gradients = []
    for bits in (None, 8):
        torch.manual_seed(1)
        model = trained(adapt(copy.deepcopy(base), family.head, activation_bits=bits)).train()
        for module in model.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        run(model, images).square().sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(gradient is not None for gradient in found.values())
        assert model.peft_config["default"].block_shapes
        gradients.append(torch.cat([gradient.flatten() for gradient in found.values()]))
    exact, coded = gradients
    assert float((coded - exact).norm() / exact.norm()) < 0.05
    model = trained(adapt(base, family.head, prompt_rank=0, side_reduction=0))
    changed = run(model, images).detach()
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged, images), changed, rtol=1e-4, atol=1e-5)
    assert any(isinstance(module, QuantizedLinear) for module in merged.modules())
