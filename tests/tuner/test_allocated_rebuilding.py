"""`activation_policy="auto"`: the calibration chooses what is kept and what is rebuilt."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
import transformers as T
from peft import PeftModel, get_peft_model
from torch import nn

from peft_s2a import S2AConfig, calibrate
from peft_s2a.memory import saved_activation_bytes
from peft_s2a.tuner.calibration import calibrations

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}


def make_base() -> nn.Module:
    torch.manual_seed(0)
    return T.ViTForImageClassification(T.ViTConfig(**SIZES, image_size=64, patch_size=8, num_labels=3)).train()


def make_model(base: nn.Module | None = None, **fields: Any) -> PeftModel:
    heads = ["classifier"] if base is None else ["head"]
    fields = {"activation_bits": "auto", "activation_policy": "auto", "modules_to_save": heads} | fields
    base = base or make_base()
    torch.manual_seed(1)
    return get_peft_model(base, S2AConfig(prompt_rank=0, side_reduction=0, **fields)).train()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"pixel_values": torch.randn(4, 3, 64, 64, generator=generator), "labels": torch.arange(4) % 3}


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    found = gradients(model, batch)
    exact = gradients(make_model(activation_bits=None, activation_policy="keep"), batch)
    difference = math.hypot(*(float((found[name] - value).norm()) for name, value in exact.items()))
    return difference / math.hypot(*(float(value.norm()) for value in exact.values()))


@pytest.mark.parametrize("groups", ["kind", "instance"])
def test_less_error_in_the_same_bytes(batch, groups):
    model = make_model(activation_groups=groups)
    allocation = calibrate(model, [batch], target_bits=4)
    rebuilt = {group.kind for group in allocation.groups if group.bits == 0}
    assert rebuilt == {"query", "key", "value", "gelu"}
    assert allocation.rebuilt_share == 1
    assert allocation.average_bits <= 4
    uniform = make_model(activation_bits=4, activation_policy="keep")
    assert saved_activation_bytes(model, batch) <= saved_activation_bytes(uniform, batch)
    assert error(model, batch) < error(uniform, batch) / 4
    assert allocation.error / 2 < error(model, batch) < allocation.error * 2


def test_a_share_of_it(batch):
    model = make_model(activation_groups="instance")
    kept = calibrate(model, [batch], rebuild_share=0)
    assert kept.rebuilt_share == 0
    assert 0 not in kept.bits.values()
    half = calibrate(model, [batch], rebuild_share=0.5)
    assert 0 < half.rebuilt_share <= 0.5
    assert half.error < kept.error
    rebuilt = {name for name, bits in half.bits.items() if bits == 0}
    assert {"query", "key", "value"} & {name.split(":")[1] for name in rebuilt} in [set(), {"query", "key", "value"}]
    # nothing is kept for what is rebuilt, and everything for the rest
    attention = next((name for name in rebuilt if ":query:" in name), None)
    calibration = calibrations(model.get_base_model())["default"]
    assert calibration.config.activation_settings().instances[attention or next(iter(rebuilt))] == 0


def test_what_is_rebuilt_is_so_in_training(batch, monkeypatch):
    """With every operator of one block rebuilt, in bytes and gradients as the policy `rebuild` of that block."""
    model = make_model(activation_groups="instance")
    groups = calibrate(model, [batch], rebuild_share=0).as_dict()
    first = "vit.layers.0"
    for group in groups["groups"]:
        again = group["name"].startswith(first) and group["kind"] != "source"
        group["bits"] = 0 if again else 8
    chosen = make_model(activation_allocation=groups)
    kept = saved_activation_bytes(chosen, batch)
    everything, nothing = (
        saved_activation_bytes(make_model(activation_bits=8, activation_policy=policy), batch)
        for policy in ("rebuild", {"product": "rebuild"})
    )
    assert kept == pytest.approx((everything + nothing) / 2, rel=0.02)


def test_what_a_policy_keeps_is_kept(batch):
    model = make_model(activation_policy={"attention": "auto"})
    rebuilt = {group.kind for group in calibrate(model, [batch]).groups if group.bits == 0}
    assert rebuilt == {"query", "key", "value"}


def test_products_of_several_tensors_count_once():
    base = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=64, depth=1, num_heads=2, num_classes=3
    )
    model = make_model(base.train(), activation_groups="instance")
    images = torch.randn(1, 3, 64, 64)
    _, rebuildings = calibrations(model.get_base_model())["default"].sensitivities(model, [images])
    tokens, channels = 65, 64
    attention, gelu = sorted(rebuildings, key=lambda r: len(r.members), reverse=True)
    assert [name.split(":")[1] for name in attention.members] == ["query", "key", "value"]
    assert attention.work == 3 * tokens * channels**2  # of one linear layer
    assert gelu.work == 4 * tokens * channels**2


def test_it_survives_saving(batch, tmp_path):
    model = make_model(activation_groups="instance", activation_rebuild_share=0.5)
    expected = gradients(model, batch)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True).train()
    assert again.peft_config["default"].activation_allocation["rebuilt_share"] > 0
    torch.testing.assert_close(gradients(again, batch), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_policy": "auto"}, "goes with activation_bits='auto'"),
        ({"activation_policy": {"gelu": "auto"}, "activation_bits": None}, "goes with activation_bits='auto'"),
        ({"activation_rebuild_share": 1.5}, "from 0 to 1"),
        ({"activation_rebuild_share": True}, "from 0 to 1"),
    ],
)
def test_configurations_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        S2AConfig(**fields)


def test_a_share_that_is_none(batch):
    with pytest.raises(ValueError, match="from 0 to 1"):
        calibrate(make_model(), [batch], rebuild_share=2)
