"""`activation_bits="auto"`: measured, shared out, stored and used."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from typing import Any

import pytest
import timm
import torch
import transformers as T
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from peft_s2a import Allocation, S2AConfig, blockwise, calibrate
from peft_s2a.ops import short_product
from peft_s2a.precision import allocate
from peft_s2a.table import Context
from peft_s2a.table.calls import Scope, plain_path
from peft_s2a.tuner.calibration import calibrations

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 8,
    "num_labels": 3,
}


def make_base(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return T.ViTForImageClassification(T.ViTConfig(**SIZES | fields)).train()


def make_model(base: nn.Module | None = None, **fields: Any) -> PeftModel:
    fields = {"activation_bits": "auto", "modules_to_save": ["classifier"]} | fields
    base = base or make_base()
    torch.manual_seed(1)
    return get_peft_model(base, S2AConfig(**fields)).train()


def make_uniform() -> PeftModel:
    return make_model(activation_bits=4, prompt_rank=0, side_reduction=0)


def make_batch(images: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"pixel_values": torch.randn(images, 3, 64, 64, generator=generator), "labels": torch.arange(images) % 3}


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return make_batch()


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def allocation_of(model: PeftModel) -> dict[str, Any]:
    return model.peft_config["default"].activation_allocation


@pytest.mark.parametrize("groups", ["kind", "instance"])
def test_bits_are_shared_out_within_the_average(batch, groups):
    model = make_model(activation_groups=groups, activation_target_bits=3.5)
    allocation = calibrate(model, [batch])
    assert allocation.average_bits <= 3.5
    kinds = {group.kind for group in allocation.groups}
    assert kinds >= {"norm", "gelu", "query", "key", "value"}
    assert len(allocation.groups) == len(kinds) if groups == "kind" else len(allocation.groups) > len(kinds)
    errors = {group.name: group.error for group in allocation.groups}
    assert allocation.error == pytest.approx(math.hypot(*errors.values()))
    assert allocation_of(model) == allocation.as_dict()
    # what is stored is what is trained with
    uniform = gradients(make_model(activation_bits=4), batch)
    assert any(not torch.equal(g, uniform[name]) for name, g in gradients(model, batch).items())
    lines = str(allocation).splitlines()
    assert len(lines) == len(allocation.groups) + 2
    assert f"{allocation.average_bits:.2f}" in lines[-1]


def test_single_operators_have_elements_and_names(batch):
    model = make_model(activation_groups="instance", prompt_rank=0, side_reduction=0)
    calibration = calibrations(model.get_base_model())["default"]
    one = {name: value[:1] for name, value in batch.items()}
    found = {s.name: s.elements for s in calibration.sensitivities(model, [one])[0]}
    row = 1024  # codes lie in rows, the last of which is filled up
    for layer in range(2):
        path = f"vit.layers.{layer}"
        for name, elements in (
            (f"{path}:norm:0", 65 * 32),
            (f"{path}:norm:1", 65 * 32),
            (f"{path}.mlp:gelu:0", 65 * 64),
        ):
            assert found[name] == -(-elements // row) * row
        for part in ("query", "key", "value"):
            assert found[f"{path}.attention:{part}:0"] == 65 * 32


def test_the_same_seed_gives_the_same_and_nothing_else_changes(batch):
    model = make_model(make_base(hidden_dropout_prob=0.1))
    model.zero_grad()
    model(**batch).loss.backward()  # calibrates, too
    del model.peft_config["default"].activation_allocation
    model.peft_config["default"].activation_allocation = None
    before = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(7)
    random = torch.get_rng_state()
    dataset = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    loader = DataLoader(dataset, batch_size=2, shuffle=True)
    modes = {name: module.training for name, module in model.named_modules()}
    one = calibrate(model, loader, seed=2)
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, p in model.named_parameters():
        assert (p.grad is None) == (before[name] is None)
        assert p.grad is None or torch.equal(p.grad, before[name])
    torch.manual_seed(8)
    assert calibrate(model, loader, seed=2) == one


def test_the_first_training_forward_calibrates_and_does_not_disturb(batch):
    lazy = make_model(make_base(hidden_dropout_prob=0.1))
    first = gradients(lazy, batch)
    assert allocation_of(lazy) is not None
    known = make_model(make_base(hidden_dropout_prob=0.1), activation_allocation=allocation_of(lazy))
    torch.testing.assert_close(first, gradients(known, batch), rtol=0, atol=0)
    torch.testing.assert_close(first, gradients(lazy, batch), rtol=0, atol=0)


def test_evaluation_calibrates_nothing(batch):
    model = make_model()
    with torch.no_grad():
        model(**batch)
    model.eval()(**batch)
    assert allocation_of(model) is None


def test_saved_and_loaded(batch, tmp_path):
    model = make_model(activation_groups="instance")
    expected = gradients(model, batch)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["activation_allocation"] == allocation_of(model)
    again = PeftModel.from_pretrained(make_base(), tmp_path, adapter_name="other", is_trainable=True).train()
    assert Allocation.from_dict(again.peft_config["other"].activation_allocation).bits
    found = gradients(again, batch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name.replace(".default", ".other")], value, rtol=0, atol=0)


@pytest.fixture
def bits_asked(monkeypatch) -> Counter[tuple[str, int | None]]:
    """How often each operator has asked for its bits, and for which."""
    found: Counter[tuple[str, int | None]] = Counter()
    original = Context._instance_bits

    def watched(self: Context, name: str, kind: str) -> int | None:
        bits = original(self, name, kind)
        found[name, bits] += 1
        return bits

    monkeypatch.setattr(Context, "_instance_bits", watched)
    return found


@pytest.mark.parametrize("policy", ["keep", "rebuild", "recompute", "auto"])
def test_pieces_of_the_batch_have_the_same_bits(batch, policy, monkeypatch, bits_asked):
    model = make_model(activation_groups="instance", activation_policy=policy, activation_target_bits=3)
    calibrate(model, [batch])
    bits_asked.clear()
    gradients(model, batch)
    whole = dict(bits_asked)
    bits_asked.clear()
    monkeypatch.setattr(blockwise, "CPU_PIECE", 1)
    gradients(model, batch)
    assert set(bits_asked) == set(whole)
    assert max(bits_asked[key] / count for key, count in whole.items()) >= 4  # one image at a time


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_have_the_same_bits(batch, bits_asked, reentrant):
    model = make_model(activation_groups="instance", activation_target_bits=3)
    calibrate(model, [batch])
    bits_asked.clear()
    expected = gradients(model, batch)
    whole = set(bits_asked)
    bits_asked.clear()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(model, batch), expected, rtol=1e-4, atol=1e-6)
    assert set(bits_asked) == whole


def test_a_compiled_model_has_the_same_bits(batch):
    known = {"by": "instance", "target_bits": 4, "groups": []}
    groups = [("vit.layers.0:norm:1", "norm", 2), ("vit.layers.1.mlp:gelu:0", "gelu", 3), ("key", "key", 6)]
    known["groups"] = [{"name": n, "kind": k, "elements": 1, "bits": b, "error": 0.0} for n, k, b in groups]
    model = make_model(activation_allocation=known, prompt_rank=0, side_reduction=0)
    expected = gradients(model, batch)
    assert any(not torch.equal(g, expected[n]) for n, g in gradients(make_uniform(), batch).items())
    compiled = torch.compile(model, backend="aot_eager")
    for name, value in gradients(compiled, batch).items():
        torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")], rtol=1e-3, atol=1e-5)


def test_squares_of_the_errors_add_up(batch):
    model = make_model(activation_groups="instance")
    calibration = calibrations(model.get_base_model())["default"]
    allocation = allocate(calibration.sensitivities(model, [batch])[0], "instance", 3)
    exact = gradients(make_model(activation_bits=None), batch)
    calibration.apply(allocation)
    found = gradients(model, batch)
    names = [name for name in exact if "s2a_" in name]
    difference = math.hypot(*(float((found[name] - exact[name]).norm()) for name in names))
    error = difference / math.hypot(*(float(exact[name].norm()) for name in names))
    assert allocation.error / 2 < error < allocation.error * 2


def test_no_names_are_made_for_bits_by_kind(batch, monkeypatch):
    model = make_model()
    calibrate(model, [batch])
    monkeypatch.setattr(Scope, "name", lambda *_: pytest.fail("a name was made"))
    gradients(model, batch)


@pytest.mark.parametrize(
    ("images", "loss"),
    [
        ("pair", None),
        ("tensor", None),
        ("mapping", lambda model, batch: model(**batch).logits.square().mean()),
    ],
)
def test_batches_of_any_form(batch, images, loss):
    forms: dict[str, Any] = {
        "pair": (batch["pixel_values"], batch["labels"]),
        "tensor": batch["pixel_values"],
        "mapping": batch,
    }
    assert calibrate(make_model(), [forms[images]], loss=loss, images=2).groups


def test_a_budget_in_bytes(batch):
    allocation = calibrate(make_model(), [batch], budget_bytes=15_000)
    assert sum(g.bits * g.elements for g in allocation.groups) <= 8 * 15_000
    with pytest.raises(ValueError, match="fewest bits"):
        calibrate(make_model(), [batch], budget_bytes=100)


def test_what_cannot_be_calibrated(batch):
    model = make_model()
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(model, [])
    broken = batch | {"pixel_values": torch.full_like(batch["pixel_values"], math.nan)}
    with pytest.raises(ValueError, match=r"calibration image 0 is nan"):
        calibrate(model, [broken])
    with pytest.raises(ValueError, match="calibration image 0"):
        model(**broken)
    assert allocation_of(model) is None
    calibrate(model, [batch])  # as if nothing had happened
    with pytest.raises(ValueError, match="from 1 to 8"):
        calibrate(model, [batch], target_bits=9)
    with pytest.raises(ValueError, match="positive whole number"):
        calibrate(model, [batch], images=0)
    with pytest.raises(ValueError, match="no S2A adapter 'none'"):
        calibrate(model, [batch], adapter_name="none")
    with pytest.raises(ValueError, match="no S2A adapter"):
        calibrate(make_base(), [batch])
    with pytest.raises(ValueError, match="says already"):
        calibrate(make_model(activation_bits=4), [batch])


def test_a_model_without_coded_operators(batch):
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.features(x).mean((2, 3))

    model = get_peft_model(Plain(), S2AConfig(activation_bits="auto", prompt_rank=0, side_reduction=0)).train()
    with pytest.raises(ValueError, match="No operator of the model keeps"):
        calibrate(model, [batch["pixel_values"]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_bits": {"norm": "auto"}}, "stands for all kinds"),
        ({"activation_target_bits": 0.5}, "from 1 to 8"),
        ({"activation_target_bits": True}, "from 1 to 8"),
        ({"activation_target_bits": math.nan}, "from 1 to 8"),
        ({"activation_groups": "layer"}, "not one of kind, instance"),
        ({"activation_bits": 4, "activation_allocation": {}}, "goes with activation_bits='auto'"),
        ({"activation_allocation": {"by": "kind"}}, "no allocation"),
        ({"activation_bits": "best"}, "best"),
    ],
)
def test_configurations_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        S2AConfig(**{"activation_bits": "auto"} | fields)


def test_until_it_is_calibrated_it_has_enough_bits():
    assert S2AConfig(activation_bits="auto", activation_target_bits=2.5).activation_settings().bits["norm"] == 3


def test_parts_of_an_attention_have_bits_of_their_own(batch):
    same = {"query": 6, "key": 6, "value": 6}
    one = gradients(make_model(activation_bits={"attention": 6}), batch)
    torch.testing.assert_close(one, gradients(make_model(activation_bits=same), batch), rtol=0, atol=0)
    other = gradients(make_model(activation_bits=same | {"value": 1}), batch)
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_paths_do_not_depend_on_the_adapter():
    path = "head.modules_to_save.default.norm.base_layer"
    assert plain_path(path) == plain_path(path.replace("default", "other")) == "head.norm"


def test_the_plot_is_drawn(batch, tmp_path):
    pytest.importorskip("matplotlib")
    for groups in ("kind", "instance"):
        calibrate(make_model(activation_groups=groups), [batch]).plot(tmp_path / f"{groups}.png")
        assert (tmp_path / f"{groups}.png").stat().st_size > 1000


def test_layers_of_encoder_and_decoder_are_told_apart():
    pytest.importorskip("matplotlib")
    from peft_s2a.precision.drawing import _container, _layer, _stacks

    paths = ["model.encoder.layers.0.mlp", "model.decoder.layers.0.mlp", "model.decoder.layers.1", "model.neck"]
    stacks = _stacks(paths)
    found = [_layer(path, stacks.get(_container(path), "")) for path in paths]
    assert found == ["encoder.0", "decoder.0", "decoder.1", "model.neck"]
    assert _stacks(paths[1:]) == {}


def test_a_batch_norm_that_needs_two_images():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.GELU(), nn.Conv2d(8, 8, 3))
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.features(x))

    fields: dict[str, Any] = {"prompt_rank": 0, "side_reduction": 0, "modules_to_save": ["head"]}
    model = get_peft_model(Pooled(), S2AConfig(activation_bits="auto", **fields)).train()
    batch = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"needs more than one image.*layer.eval\(\)"):
        calibrate(model, [batch])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert calibrate(model, [batch]).groups


def test_norms_with_an_activation_inside_are_told_apart(bits_asked):
    torch.manual_seed(0)
    base = timm.create_model("efficientnet_b0", num_classes=3)  # copies of its norms, which have parts, run
    fields: dict[str, Any] = {"train_batch_norm": True, "prompt_rank": 0, "side_reduction": 0}
    config = S2AConfig(activation_bits="auto", modules_to_save=["classifier"], **fields)
    config.activation_allocation = {
        "by": "instance",
        "target_bits": 4,
        "groups": [{"name": "bn1:norm:0", "kind": "norm", "elements": 1, "bits": 2, "error": 0.0}],
    }
    model = get_peft_model(base, config).train()
    model(torch.randn(2, 3, 64, 64))
    norms = {name for name, _ in bits_asked if ":norm:" in name}
    assert len(norms) == sum(isinstance(module, nn.BatchNorm2d) for module in base.modules())


def test_what_is_measured_are_the_codes_and_not_the_products_of_backward(batch, monkeypatch):
    monkeypatch.setattr(short_product, "MIN_WORK", 1)
    monkeypatch.setattr(short_product, "MIN_CHANNELS", 1)
    found = {}
    for short in (True, False):
        monkeypatch.setattr(short_product, "multiplies_bfloat16", lambda device, short=short: short)
        model = make_model()
        found[short] = calibrate(model, [batch], images=2)
        trained = gradients(model, batch)
        assert found[short].as_dict() == found[True].as_dict()
        found[short, "gradients"] = torch.cat([g.flatten() for g in trained.values()])
    assert not torch.equal(found[True, "gradients"], found[False, "gradients"])
