"""Calls that are remembered give what torch gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from peft_s2a import S2AConfig
from peft_s2a.memory import simulate_step
from peft_s2a.memory.fake_calls import FakeCalls

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize("policy", ["keep", "rebuild", "recompute"])
def test_a_step_is_the_same(policy, monkeypatch):
    torch.manual_seed(0)
    base = T.ViTForImageClassification(T.ViTConfig(**SIZES, image_size=64, patch_size=8, num_labels=3))
    model = get_peft_model(base, S2AConfig(modules_to_save=["classifier"], activation_policy=policy))
    batch = {"pixel_values": torch.randn(3, 3, 64, 64), "labels": torch.arange(3)}
    found = simulate_step(model, batch, torch.optim.AdamW)
    monkeypatch.setattr(FakeCalls, "run", lambda self, func, args, kwargs: func(*args, **kwargs))
    assert simulate_step(model, batch, torch.optim.AdamW) == found


class Remembered(TorchDispatchMode):
    """Runs everything through `FakeCalls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = FakeCalls()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.calls.run(func, args, kwargs or {})


def test_views_share_their_storage_and_functions_in_place_return_their_argument():
    with FakeTensorMode() as mode, Remembered() as remembered:
        mode.cache_enabled = False
        for _ in range(3):
            x = torch.empty(4, 6)
            view = x[1:3].t()
            assert (tuple(view.shape), view.stride(), view.storage_offset()) == ((6, 2), (1, 6), 6)
            assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
            assert view.mul_(2) is view
            assert (x + 1).dtype == torch.float32
            assert (x + torch.empty(6, dtype=torch.float64)).dtype == torch.float64
            assert (torch.empty(3, dtype=torch.int64) + 1).dtype == torch.int64
            assert (torch.empty(3, dtype=torch.int64) + 1.0).dtype == torch.float32
            values, places = x.max(1)
            assert (values.dtype, places.dtype) == (torch.float32, torch.int64)
    assert remembered.calls._known


def test_what_changes_the_layout_of_its_argument_runs_each_time():
    with FakeTensorMode(), Remembered():
        for _ in range(3):
            x, y = torch.empty(4, 6), torch.empty(5)
            x.t_()
            assert tuple(x.shape) == (6, 4)
            with torch.no_grad():
                x.set_(y)
            assert tuple(x.shape) == (5,)


def test_what_is_given_its_result_returns_it():
    calls = FakeCalls()
    with FakeTensorMode() as mode:
        mode.cache_enabled = False
        for _ in range(2):
            x, result = torch.empty(4, 6), torch.empty(4, 6)
            found = calls.run(torch.ops.aten.mul.out, (x, x), {"out": result})
            assert found.untyped_storage()._cdata == result.untyped_storage()._cdata
