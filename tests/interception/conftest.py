"""A toy model with one of everything, and what the tests of the interception do with it."""

from __future__ import annotations

import types
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import _len_torch_function_stack
from torch.utils.checkpoint import checkpoint

from peft_s2a.interception import ActivationInterceptor
from peft_s2a.settings import ActivationSettings, Rounding

B, L, D, H = 3, 16, 64, 4


class Block(nn.Module):
    """One of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.1)
        self.gated = True

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, H, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.proj(mixed))
        hidden = self.down(F.gelu(self.up(self.norm2(x))))
        return x + self.relu(hidden + 0.0) * (torch.sigmoid(hidden) if self.gated else 1.0)


class Model(nn.Module):
    def __init__(self, checkpointing: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(D))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(D, 5)
        self.checkpointing = checkpointing
        self.with_mask = False

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift
        mask = None
        if self.with_mask:
            rows = torch.linspace(-1, 1, B * L).view(B, 1, L, 1)
            mask = rows + torch.linspace(0, 1, H * L).view(1, H, 1, L)
        for block in self.blocks:
            x = block(x, mask) if self.checkpointing is None else checkpoint(block, x, mask, **self.checkpointing)
        return self.head(x.mean(1))


def attach(
    model: nn.Module, bits: int | None = 4, blocks: bool = True, rounding: Rounding = "nearest"
) -> ActivationInterceptor:
    interceptor = ActivationInterceptor()
    layer = types.SimpleNamespace(disable_adapters=False, active_adapters=["default"])
    interceptor.layer = cast(BaseTunerLayer, layer)
    interceptor.set_adapter_settings("default", ActivationSettings.from_config(bits, activation_rounding=rounding))
    interceptor.attach(model)
    if blocks and isinstance(model, Model):
        for block in model.blocks:
            interceptor.attach(block)
    return interceptor


def make(seed: int = 0, **options: Any) -> Model:
    torch.manual_seed(seed)
    model = Model(**options)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "shift" or name.endswith("bias"))
    return model


def batch(seed: int = 1) -> Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, x: Tensor, **backward: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(11)
    output = model(x)
    output.square().sum().backward(**backward)
    assert _len_torch_function_stack() == 0
    return output.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    total: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        total[storage.data_ptr()] = storage.nbytes()
        return tensor

    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with saved_tensors_hooks(pack, lambda t: t):
        output = model(x)
    del output
    return sum(size for address, size in total.items() if address not in known)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    error = sum(float((actual[n] - g).square().sum()) for n, g in expected.items())
    return (error / sum(float(g.square().sum()) for g in expected.values())) ** 0.5


@pytest.fixture
def toy() -> types.SimpleNamespace:
    """The model, its sizes, and the functions above."""
    return types.SimpleNamespace(
        attach=attach,
        make=make,
        batch=batch,
        step=step,
        saved_bytes=saved_bytes,
        assert_same=assert_same,
        relative_error=relative_error,
        Model=Model,
        Block=Block,
        B=B,
        L=L,
        D=D,
        H=H,
    )
