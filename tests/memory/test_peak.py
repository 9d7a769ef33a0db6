"""The peak of steps that can be counted by hand, and what a timeline says about them."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from torch import Tensor, nn

from peft_s2a.memory import memory_timeline, optimizer_state_bytes, peak_step_bytes

ELEMENTS = 64 * 1024
BLOCK = ELEMENTS * 4  # bytes
SMALL = 1024  # losses, scalars, biases


class Chain(nn.Module):
    """`depth` times exp, each of which keeps its output."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift
        for _ in range(self.depth):
            x = x.exp()
        return x


@pytest.fixture
def batch() -> Tensor:
    return torch.full((ELEMENTS,), -1.0)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_peak_of_a_chain(depth: int, batch: Tensor) -> None:
    # The most is live in the backward of the last exp: the outputs of all, the gradient of the mean, and the gradient
    # that exp makes of it.
    peak = peak_step_bytes(Chain(depth), batch)
    expected = (depth + 2) * BLOCK
    assert expected <= peak <= expected + SMALL


def test_loss_of_the_model_is_used(batch: Tensor) -> None:
    class WithLoss(Chain):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = super().forward(x)
            return {"loss": x[:1].sum(), "logits": x}

    assert 3 * BLOCK <= peak_step_bytes(WithLoss(1), batch) <= 3 * BLOCK + SMALL


def test_gradients_count_and_optimizer_state_does_not() -> None:
    model = nn.Linear(256, 256, bias=False)
    weight_bytes = 256 * 256 * 4
    batch = torch.randn(1, 256)
    assert weight_bytes <= peak_step_bytes(model, batch) <= weight_bytes + 4 * SMALL
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    assert weight_bytes <= peak_step_bytes(model, batch, optimizer) <= weight_bytes + 4 * SMALL
    assert optimizer_state_bytes(optimizer) == 0
    model(batch).sum().backward()
    optimizer.step()
    assert optimizer_state_bytes(optimizer) == weight_bytes


def test_model_and_optimizer_are_put_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    batch = torch.randn(4, 8)
    model(batch).sum().backward()
    optimizer.step()
    gradients = [parameter.grad for parameter in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    steps = [entry["step"].clone() for entry in optimizer.state.values()]
    moments = [entry["exp_avg"].clone() for entry in optimizer.state.values()]
    random_state = torch.get_rng_state()
    peak_step_bytes(model, batch, optimizer)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close([entry["step"] for entry in optimizer.state.values()], steps)
    torch.testing.assert_close([entry["exp_avg"] for entry in optimizer.state.values()], moments, rtol=0, atol=0)
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), gradients, strict=True))
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_frozen_model_is_an_error(batch: Tensor) -> None:
    with pytest.raises(ValueError, match="trainable"):
        peak_step_bytes(Chain(1).requires_grad_(False), batch)


def test_the_same_again(batch: Tensor) -> None:
    model = nn.Sequential(Chain(3), nn.Dropout(0.5))
    peaks = {peak_step_bytes(model, batch) for _ in range(5)}
    assert len(peaks) == 1


def test_nothing_leaks(batch: Tensor) -> None:
    model = Chain(3)
    peak_step_bytes(model, batch)
    memory_timeline(model, batch)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_timeline_agrees_with_the_peak(batch: Tensor) -> None:
    model = Chain(4)
    timeline = memory_timeline(model, batch)
    assert timeline.peak_bytes == peak_step_bytes(model, batch)
    assert timeline.live_bytes[-1] == 4  # the gradient of the shift
    assert all(live >= 0 for live in timeline.live_bytes)
    times = [event.time for event in timeline.events]
    assert times == sorted(times)
    assert times[0] == 0


def test_timeline_names_operators_and_phases(batch: Tensor) -> None:
    timeline = memory_timeline(Chain(4), batch, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    large = [event for event in timeline.events if event.bytes == BLOCK]
    assert [event.operator for event in large if event.phase == "forward"] == ["aten::add"] + 4 * ["aten::exp"]
    assert {event.operator for event in large if event.phase == "backward"} == {"aten::div", "aten::mul"}
    assert {event.phase for event in timeline.events if event.bytes > 0} == {"forward", "backward"}
    at_peak = [event for event in timeline.live_at_peak() if event.bytes == BLOCK]
    assert sorted(event.operator for event in at_peak) == ["aten::div"] + 4 * ["aten::exp"] + ["aten::mul"]
    assert sum(event.bytes for event in timeline.live_at_peak()) == timeline.peak_bytes


def test_timeline_as_data_and_plot(batch: Tensor, tmp_path) -> None:
    timeline = memory_timeline(Chain(2), batch)
    data = json.loads(json.dumps(timeline.as_dict()))
    assert data["peak_bytes"] == timeline.peak_bytes
    assert [event["live_bytes"] for event in data["events"]] == list(timeline.live_bytes)
    timeline.plot(tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
