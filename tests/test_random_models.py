"""Random stacks of operators with residuals, gates and norms: coded gradients are near the exact ones."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from peft_s2a.mode import ActivationMode
from peft_s2a.settings import ActivationSettings

B, L, D, H = 4, 24, 64, 4
Layer = Callable[[Tensor, nn.ParameterList], Tensor]


def attend(x: Tensor, w: nn.ParameterList) -> Tensor:
    heads = F.linear(x, w[0], w[1]).view(B, L, H, D // H).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(B, L, D)


def attend_written_out(x: Tensor, w: nn.ParameterList) -> Tensor:
    heads = F.linear(x, w[0], w[1]).view(B, L, H, D // H).transpose(1, 2)
    scores = torch.matmul(heads, heads.transpose(2, 3)) * (D // H) ** -0.5
    return torch.matmul(scores.softmax(-1), heads).transpose(1, 2).reshape(B, L, D)


LAYERS: dict[str, Layer] = {
    "gelu": lambda x, w: F.gelu(F.linear(x, w[0], w[1])),
    "tanh gelu": lambda x, w: F.gelu(F.linear(x, w[0], w[1]), approximate="tanh"),
    "quick gelu": lambda x, w: (y := F.linear(x, w[0], w[1])) * torch.sigmoid(1.702 * y),
    "swiglu": lambda x, w: F.silu(F.linear(x, w[0], w[1])) * x,
    "relu": lambda x, w: F.relu(F.linear(x, w[0], w[1])),
    "hardswish": lambda x, w: F.hardswish(F.linear(x, w[0], w[1])),
    "layer norm": lambda x, w: F.layer_norm(x, (D,), w[2], w[1]),
    "rms norm": lambda x, w: F.rms_norm(x, (D,), w[2]) + w[1],
    "group norm": lambda x, w: F.group_norm(x.transpose(1, 2), 8, w[2], w[1]).transpose(1, 2),
    "convolution": lambda x, w: F.conv1d(x.transpose(1, 2), w[3], w[1], padding=1).transpose(1, 2),
    "attention": attend,
    "attention, written out": attend_written_out,
    "exponential": lambda x, w: torch.exp(-F.linear(x, w[0], w[1]).square()),
}


class Stack(nn.Module):
    """Layers in a row, some behind a residual; weights are frozen, biases trained."""

    def __init__(self, plan: list[tuple[str, bool]], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def parameter(*shape: int, scale: float, trained: bool = False) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * scale, requires_grad=trained)

        self.plan = plan
        self.weights = nn.ModuleList(
            nn.ParameterList(
                [
                    parameter(D, D, scale=D**-0.5),
                    parameter(D, scale=0.1, trained=True),
                    nn.Parameter(1 + torch.randn(D, generator=generator) * 0.1, requires_grad=False),
                    parameter(D, D, 3, scale=(3 * D) ** -0.5),
                ]
            )
            for _ in plan
        )

    def forward(self, x: Tensor) -> Tensor:
        for (name, residual), weights in zip(self.plan, self.weights, strict=True):
            y = LAYERS[name](x, weights)
            x = x + y if residual else y
        return x


def gradient(model: Stack, x: Tensor, bits: int | None) -> Tensor:
    with ActivationMode(ActivationSettings.from_config(bits)):
        output = model(x)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    biases = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad((output * target).sum(), biases)])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    plan=st.lists(st.tuples(st.sampled_from(sorted(LAYERS)), st.booleans()), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_gradients_of_random_stacks(plan: list[tuple[str, bool]], seed: int) -> None:
    model = Stack(plan, seed)
    x = torch.randn(B, L, D, generator=torch.Generator().manual_seed(seed))
    target = torch.randn(B, L, D, generator=torch.Generator().manual_seed(1))
    biases = [p for p in model.parameters() if p.requires_grad]
    stock = torch.cat([g.flatten() for g in torch.autograd.grad((model(x) * target).sum(), biases)])
    torch.testing.assert_close(gradient(model, x, None), stock, rtol=1e-4, atol=1e-4)
    errors = {
        bits: ((gradient(model, x, bits) - stock).norm() / stock.norm().clamp_min(1e-6)).item() for bits in (8, 4)
    }
    assert errors[8] < 0.05, errors
    assert errors[4] < 0.5, errors
