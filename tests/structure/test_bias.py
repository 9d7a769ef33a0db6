"""The bias delta on every supported layer."""

from __future__ import annotations

import pytest
import torch
from timm.layers import BatchNormAct2d, LayerNorm2d, RmsNorm, RmsNorm2d
from torch import nn
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from peft_s2a.structure import bias_slots, call_with_bias_deltas, is_supported

TOKENS, LAST, FIRST = (2, 5, 8), (2, 3, 3, 8), (2, 8, 4, 4)
LAYERS = {
    "linear": (nn.Linear(8, 6), TOKENS, -1),
    "linear without bias": (nn.Linear(8, 6, bias=False), TOKENS, -1),
    "conv1d": (nn.Conv1d(8, 6, 1), (2, 8, 5), 1),
    "conv2d": (nn.Conv2d(8, 6, 3, bias=False), FIRST, 1),
    "conv3d": (nn.Conv3d(8, 6, 1), (2, 8, 2, 3, 3), 1),
    "transformers Conv1D": (Conv1D(6, 8), TOKENS, -1),
    "layer norm": (nn.LayerNorm(8), TOKENS, -1),
    "layer norm without bias": (nn.LayerNorm(8, bias=False), TOKENS, -1),
    "layer norm without weight": (nn.LayerNorm(8, elementwise_affine=False), TOKENS, -1),
    "rms norm": (nn.RMSNorm(8), TOKENS, -1),
    "llama rms norm": (LlamaRMSNorm(8), TOKENS, -1),
    "timm rms norm": (RmsNorm(8), TOKENS, -1),
    "timm rms norm 2d": (RmsNorm2d(8), FIRST, 1),
    "batch norm": (nn.BatchNorm2d(8).eval(), FIRST, 1),
    "batch norm 1d": (nn.BatchNorm1d(8).eval(), (2, 8, 5), 1),
    "batch norm without weight": (nn.BatchNorm2d(8, affine=False).eval(), FIRST, 1),
    "group norm": (nn.GroupNorm(2, 8), FIRST, 1),
    "group norm without weight": (nn.GroupNorm(2, 8, affine=False), FIRST, 1),
    "convnext channels first": (ConvNextLayerNorm(8, data_format="channels_first"), FIRST, 1),
    "convnext channels last": (ConvNextLayerNorm(8), LAST, -1),
    "timm layer norm 2d": (LayerNorm2d(8), FIRST, 1),
}


@pytest.mark.parametrize("name", list(LAYERS))
def test_delta_is_added_to_every_channel(name):
    layer, shape, dim = LAYERS[name]
    layer.requires_grad_(False)
    keys = list(layer.state_dict())
    assert is_supported(layer)
    (slot,) = bias_slots(layer)
    x = torch.randn(shape)
    expected = layer(x)
    delta = torch.randn(slot.width, requires_grad=True)
    output = call_with_bias_deltas(layer, {slot: delta}, (x,), {})
    view = [1] * expected.dim()
    view[dim] = slot.width
    torch.testing.assert_close(output, expected + delta.view(view))

    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    rest = [d for d in range(output.dim()) if d != dim % output.dim()]
    torch.testing.assert_close(delta.grad, grad_output.sum(rest))
    assert list(layer.state_dict()) == keys
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", list(LAYERS))
def test_zero_delta_changes_nothing(name):
    layer, shape, _ = LAYERS[name]
    (slot,) = bias_slots(layer)
    x = torch.randn(shape)
    output = call_with_bias_deltas(layer, {slot: torch.zeros(slot.width)}, (x,), {})
    torch.testing.assert_close(output, layer(x))


def test_batch_norm_with_activation():
    layer = BatchNormAct2d(8).eval()
    (slot,) = bias_slots(layer)
    x, delta = torch.randn(FIRST), torch.randn(8)
    expected = torch.relu(nn.functional.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, delta))
    torch.testing.assert_close(call_with_bias_deltas(layer, {slot: delta}, (x,), {}), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_has_two_biases(bias):
    layer = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)
    reference = nn.MultiheadAttention(8, 2, batch_first=True)
    reference.load_state_dict(layer.state_dict(), strict=False)
    deltas = {slot: torch.randn(slot.width) for slot in bias_slots(layer)}
    assert [slot.width for slot in deltas] == [24, 8]
    inner, outer = deltas.values()
    with torch.no_grad():
        reference.in_proj_bias.copy_(inner if not bias else inner + layer.in_proj_bias)
        reference.out_proj.bias.copy_(outer if not bias else outer + layer.out_proj.bias)
    x = torch.randn(2, 5, 8)
    output, _ = call_with_bias_deltas(layer, deltas, (x, x, x), {"need_weights": False})
    torch.testing.assert_close(output, reference(x, x, x, need_weights=False)[0])


def test_hooks_of_the_layer_run_and_errors_leave_it_as_it_was():
    layer = nn.Linear(4, 4)
    bias, seen = layer.bias, []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    (slot,) = bias_slots(layer)
    call_with_bias_deltas(layer, {slot: torch.ones(4)}, (torch.ones(1, 4),), {})
    assert len(seen) == 1
    with pytest.raises(RuntimeError):
        call_with_bias_deltas(layer, {slot: torch.ones(4)}, (torch.ones(1, 5),), {})
    assert layer.bias is bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_delta_on_a_narrow_layer(dtype):
    layer = nn.Linear(4, 4, dtype=dtype)
    (slot,) = bias_slots(layer)
    delta = torch.randn(4)
    x = torch.randn(2, 4, dtype=dtype)
    output = call_with_bias_deltas(layer, {slot: delta}, (x,), {})
    torch.testing.assert_close(output, nn.functional.linear(x, layer.weight, (layer.bias.float() + delta).to(dtype)))


def test_nothing_is_kept_for_the_delta():
    layer = nn.Linear(8, 8).requires_grad_(False)
    (slot,) = bias_slots(layer)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        call_with_bias_deltas(layer, {slot: torch.zeros(8, requires_grad=True)}, (torch.randn(64, 8),), {})
    assert torch.Size([64, 8]) not in kept


@pytest.mark.parametrize("layer", [nn.Embedding(3, 4), nn.ReLU(), nn.Identity(), nn.Dropout()])
def test_other_layers_are_refused(layer):
    assert not is_supported(layer)
    with pytest.raises(ValueError, match="cannot be put on"):
        bias_slots(layer)


class ScaleNorm(nn.Module):
    """A norm of a model's own, whose absent bias is a plain attribute that its forward does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.bias = None

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).rsqrt() * self.weight


class RMSNormOfAModel(ScaleNorm):
    pass


def test_an_absent_bias_that_is_a_plain_attribute():
    layer = RMSNormOfAModel()
    (slot,) = bias_slots(layer)
    delta, x = torch.randn(4), torch.randn(3, 4)
    torch.testing.assert_close(call_with_bias_deltas(layer, {slot: delta}, (x,), {}), layer(x) + delta)
    assert layer.bias is None
