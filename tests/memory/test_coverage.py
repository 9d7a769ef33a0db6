"""The coverage report counts what is kept once, and says by which rule."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_s2a.interception import ActivationInterceptor
from peft_s2a.memory import coverage_report, saved_activation_bytes
from peft_s2a.settings import ActivationSettings


class Always:
    """Stands for a tuner layer whose adapter is always active."""

    disable_adapters = False
    active_adapters = ("default",)


class Net(nn.Module):
    """One operator of the table (GELU), one exact one (ReLU) and one that torch keeps for itself (exp)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.last = nn.Linear(64, 64)
        self.requires_grad_(False)
        self.first.bias.requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.exp(-F.relu(F.gelu(self.first(x)))))


def make(bits: int | None) -> Net:
    net = Net()
    interceptor = ActivationInterceptor()
    interceptor.layer = Always()  # type: ignore[assignment]
    interceptor.set_adapter_settings("default", ActivationSettings.from_config(bits))
    interceptor.attach(net)
    return net


def test_rules_and_bytes() -> None:
    net, x = make(4), torch.randn(512, 64)
    report = coverage_report(net, x)
    by_operator = {row.operator: row for row in report.rows}
    gelu, relu, exp = (by_operator[n] for n in ("PointwiseFunctionBackward", "MaskedFunctionBackward", "ExpBackward0"))
    assert (gelu.rule, gelu.bits, gelu.bytes) == ("coded", 4, 512 * 64 // 2 + 32 * 2)
    assert (relu.rule, relu.bits, relu.bytes) == ("exact", None, 512 * 64 // 8)
    assert (exp.rule, exp.bits, exp.bytes) == ("leftover", 8, 512 * 64 + 2 * 512 * 2)
    assert report.total_bytes == sum(report.bytes_by_rule().values()) == saved_activation_bytes(net, x)
    assert report.left_alone() == ()
    assert [row["operator"] for row in report.as_dicts()] == [row.operator for row in report.rows]


def test_what_is_left_alone_is_named() -> None:
    report = coverage_report(make(None), torch.randn(512, 64))
    assert {row.operator for row in report.left_alone()} == {"GeluBackward0", "ExpBackward0"}
    assert "in full" in str(report)
    assert str(report).count("\n") > len(report.rows)
