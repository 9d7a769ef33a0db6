"""Plans and budgets: what they say, what they choose, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
import transformers as T
from peft import PeftModel, get_peft_model
from torch import nn

from peft_s2a import S2AConfig, plan
from peft_s2a.memory import CannotSimulateError, peak_step_bytes, simulate_step
from peft_s2a.memory.budget import format_bytes, parse_bytes
from peft_s2a.memory.plan import Plan, PlanRow, fastest
from peft_s2a.tuner.planning import POLICIES, _levels

VIT = T.ViTConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=256,
    image_size=64,
    patch_size=8,
    num_labels=3,
)


@pytest.fixture(scope="module")
def vit_plan() -> Plan:
    return plan(VIT, batch_size=256, budget="100MB")


def test_rows(vit_plan):
    names = [row.name for row in vit_plan.rows]
    s2a = [f"S2A {policy}, 4 bits" for policy in POLICIES]
    assert names[:3] == ["full fine-tuning", "LoRA q, v", "LoRA q, v + checkpointing"]
    assert names[3 : 3 + len(s2a)] == s2a
    for row in vit_plan.rows:
        assert row.fits == (row.peak <= 100e6)
        assert row.fits == (row.largest_batch >= 256)
        assert (
            row.peak <= row.weights + row.gradients + row.optimizer + row.kept + row.temporaries + 256 * 3 * 64**2 * 8
        )
        assert 0 < row.smallest_peak < row.peak
    full, lora, checkpointing, *_ = vit_plan.rows
    assert full.relative_flops == 1
    assert lora.relative_flops < checkpointing.relative_flops
    assert lora.kept > 3 * checkpointing.kept
    assert full.trainable == sum(p.numel() for p in T.ViTForImageClassification(VIT).parameters())
    assert full.optimizer == pytest.approx(8 * full.trainable, rel=1e-3)


def test_rows_are_what_a_real_step_takes(vit_plan):
    row = vit_plan.rows[3]
    model = get_peft_model(T.ViTForImageClassification(VIT), row.config)
    batch = {"pixel_values": torch.randn(256, 3, 64, 64), "labels": torch.zeros(256, dtype=torch.long)}
    measured = peak_step_bytes(model, batch) + row.weights + row.optimizer + sum(t.nbytes for t in batch.values())
    assert row.peak == pytest.approx(measured, rel=0.05)


def test_the_recommendation(vit_plan):
    best = vit_plan.recommended
    assert best is not None
    assert best.fits
    fewest = min(row.relative_flops for row in vit_plan.rows if row.fits)
    assert best.relative_flops <= 1.05 * fewest
    assert isinstance(vit_plan.config, S2AConfig)
    assert vit_plan.config.modules_to_save == ["classifier"]
    assert vit_plan.config.activation_bits == 4


def rows(*columns: tuple[str, int, float]) -> list[PlanRow]:
    return [PlanRow(name, 1, 10, 1, 1, 1, 1, peak, peak // 2, 2, peak <= 100, flops) for name, peak, flops in columns]


def test_the_fastest_and_among_equals_the_first():
    assert fastest(rows(("a", 1, 1.0), ("b", 1, 0.7), ("c", 1, 0.68))).name == "b"
    assert fastest(rows(("a", 1, 1.0), ("b", 1, 0.8), ("c", 1, 0.68))).name == "c"
    assert fastest([]) is None


def test_nothing_fits():
    found = Plan("M", 4, 100, tuple(rows(("a", 500, 1.0), ("b", 300, 0.7))))
    assert found.recommended is None
    assert found.config is None
    assert "the largest batch that does is 2 with a" in str(found)


def test_another_budget_without_another_simulation(vit_plan):
    small, large = vit_plan.with_budget("10MB"), vit_plan.with_budget("10GB")
    assert not any(row.fits for row in small.rows)
    assert small.config is None
    assert all(row.fits for row in large.rows)
    for row, before in zip(large.rows, vit_plan.rows, strict=True):
        assert row.peak == before.peak
        assert row.largest_batch > before.largest_batch
    assert large.budget == 10**10


def test_as_text_as_data_and_as_a_plot(vit_plan, tmp_path):
    text = str(vit_plan)
    assert "ViTForImageClassification, batch of 256, budget 100 MB" in text
    assert all(row.name in text for row in vit_plan.rows)
    assert f"recommended: {vit_plan.recommended.name}" in text
    data = json.loads(json.dumps(vit_plan.as_dict()))
    assert data["rows"][0]["peak"] == vit_plan.rows[0].peak
    assert data["recommended"] == vit_plan.recommended.name
    vit_plan.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_fewer_bits_where_no_policy_fits(vit_plan):
    four = min(row.peak for row in vit_plan.rows if row.name.startswith("S2A") and "4 bits" in row.name)
    found = plan(VIT, batch_size=256, budget=four - 1)
    names = [row.name for row in found.rows if row.adaptive]
    assert names[: len(POLICIES)] == [f"S2A {policy}, 4 bits" for policy in POLICIES]
    assert any("3 bits" in name for name in names)
    assert found.config.activation_bits < 4


def test_a_module_stays_as_it_is():
    model = T.ViTForImageClassification(VIT).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    found = plan(model, batch_size=4, budget="1GB", dtype="bfloat16")
    assert next(model.parameters()).dtype == torch.float32
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model.training
    assert list(model.state_dict()) == list(before)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert found.rows[0].weights == pytest.approx(2 * sum(p.numel() for p in model.parameters()), rel=0.01)


def test_names_folders_and_timm(tmp_path, vit_plan):
    VIT.save_pretrained(tmp_path)
    assert plan(str(tmp_path), batch_size=256, budget="100MB").as_dict() == vit_plan.as_dict()
    found = plan("timm/resnet10t", batch_size=2, image_size=64, budget="1GB")
    assert ("LoRA + checkpointing" in dict(found.left_out)) != any("checkpointing" in row.name for row in found.rows)
    assert {"full fine-tuning", "LoRA"} <= {row.name for row in found.rows}
    with pytest.raises(ValueError, match="timm has no model 'resnet_of_nobody'"):
        plan("timm/resnet_of_nobody")


def test_models_without_checkpointing_are_left_out():
    config = T.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=3)
    found = plan(config, batch_size=2, image_size=64, budget="1GB", optimizer="sgd")
    assert found.left_out == (("LoRA + checkpointing", "the model class has no gradient checkpointing"),)
    assert "no gradient checkpointing" in str(found)
    assert found.rows[0].optimizer == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": "8 apples"}, "'8 apples' is not a size of memory: write '8GB'"),
        ({"budget": "100KB"}, "budget='100KB' is below the weights, which take .* smallest peak, .* with a batch of 1"),
        ({"batch_size": 0}, "batch_size=0 must be a positive whole number"),
        ({"dtype": "float33"}, "dtype='float33' is not a dtype"),
        ({"optimizer": "lion"}, "optimizer='lion' is not one of adamw"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(VIT, **{"batch_size": 2, **arguments})


def test_adapted_models_and_models_that_need_data():
    adapted = get_peft_model(T.ViTForImageClassification(VIT), S2AConfig(modules_to_save=["classifier"]))
    with pytest.raises(ValueError, match="model without adapters"):
        plan(adapted)

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x).mean((2, 3))
            return self.head(x if float(x.sum()) > 0 else -x)

    with pytest.raises(CannotSimulateError, match="Looks cannot be simulated"):
        plan(Looks(), S2AConfig(prompt_rank=0, side_reduction=0, image_size=32))


def test_sizes():
    assert [parse_bytes(s) for s in ("8GB", "8 gib", "1.5 MB", 7)] == [8 * 10**9, 8 * 2**30, 1_500_000, 7]
    for wrong in ("8", "GB", "-1GB", "0GB", 0, -5, True, None, 1.5):
        with pytest.raises(ValueError, match="is not a size of memory"):
            parse_bytes(wrong)
    assert [format_bytes(n) for n in (7, 2500, 640_000_000, 7_912_000_000)] == ["7 B", "2.5 KB", "640 MB", "7.91 GB"]


# the budget of a configuration


def test_a_budget_is_applied_and_saved(tmp_path, vit_plan):
    four = min(row.peak for row in vit_plan.rows if row.adaptive and "4 bits" in row.name)
    fields_ = {"modules_to_save": ["classifier"], "planned_batch_size": 256}
    roomy = get_peft_model(T.ViTForImageClassification(VIT), S2AConfig(memory_budget="1GB", **fields_))
    assert roomy.peft_config["default"].activation_bits == 4
    config = S2AConfig(memory_budget=four - 1, **fields_)
    model = get_peft_model(T.ViTForImageClassification(VIT), config)
    chosen = model.peft_config["default"]
    assert chosen.activation_bits in (2, 3)
    assert chosen.memory_plan["peak_bytes"] < four
    assert chosen.memory_plan["batch_size"] == 256
    assert config.memory_plan is None  # the configuration that was given is a template
    batch = {
        "pixel_values": torch.empty(256, 3, 64, 64, device="meta"),
        "labels": torch.zeros(256, dtype=torch.long, device="meta"),
    }
    optimizer = {field.name: field for field in fields(chosen)}
    assert "memory_plan" in optimizer
    assert simulate_step(model, batch, torch.optim.AdamW).peak == chosen.memory_plan["peak_bytes"]

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(T.ViTForImageClassification(VIT), tmp_path, is_trainable=True)
    again = loaded.peft_config["default"]
    assert (again.activation_bits, again.memory_plan) == (chosen.activation_bits, chosen.memory_plan)


def test_loading_plans_nothing(tmp_path, monkeypatch):
    config = S2AConfig(memory_budget="1GB", planned_batch_size=4, modules_to_save=["classifier"])
    get_peft_model(T.ViTForImageClassification(VIT), config).save_pretrained(tmp_path)

    def refuse(*_):
        raise AssertionError("planned again")

    monkeypatch.setattr("peft_s2a.tuner.planning.make_shape_model", refuse)
    for trainable in (False, True):
        PeftModel.from_pretrained(T.ViTForImageClassification(VIT), tmp_path, is_trainable=trainable)
    with pytest.raises(AssertionError, match="planned again"):
        get_peft_model(T.ViTForImageClassification(VIT), config)


def test_mixed_and_exact_bits_are_kept():
    for bits in ({"gelu": 2}, None):
        config = S2AConfig(
            memory_budget="1GB", planned_batch_size=4, activation_bits=bits, modules_to_save=["classifier"]
        )
        model = get_peft_model(T.ViTForImageClassification(VIT), config)
        assert model.peft_config["default"].activation_bits == bits


@pytest.mark.parametrize(
    ("budget", "batch", "message"),
    [
        ("200KB", 4, "memory_budget='200KB' is below the weights"),
        (
            "600KB",
            256,
            "is not met by S2A on ViT.* with a batch of 256: the smallest peak is .*, and one image needs [0-9]+ KB",
        ),
        ("20MB", 256, "is not met by S2A on ViT.* with a batch of 256: the smallest peak is .*, and the largest batch"),
    ],
)
def test_a_budget_that_nothing_meets(budget, batch, message):
    model = T.ViTForImageClassification(VIT)
    config = S2AConfig(memory_budget=budget, planned_batch_size=batch, modules_to_save=["classifier"])
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert all(p.requires_grad for p in model.parameters())  # nothing was touched


def test_a_budget_needs_a_batch_size():
    for size in (None, 0, True, 2.5):
        with pytest.raises(ValueError, match="needs planned_batch_size"):
            S2AConfig(memory_budget="8GB", planned_batch_size=size)
    with pytest.raises(ValueError, match="is not a size of memory"):
        S2AConfig(memory_budget="much", planned_batch_size=4)


def test_what_was_calibrated_is_planned_as_it_is():
    group = {"name": "norm", "kind": "norm", "elements": 8, "bits": 3, "error": 0.1}
    allocation = {"by": "kind", "target_bits": 3, "groups": [group]}
    config = S2AConfig(activation_bits="auto", activation_policy="rebuild", activation_allocation=allocation)
    (level,) = _levels(config)
    assert [candidate.name for candidate in level] == ["S2A rebuild, 3.00 bits on average"]
    assert level[0].config.activation_allocation == allocation
