"""`MemoryReportCallback`: what it logs, and that training does not notice it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_s2a import MemoryReportCallback
from peft_s2a.memory import optimizer_state_bytes, peak_step_bytes, saved_activation_bytes


@pytest.fixture
def train(adapted_vit, samples, tmp_path):
    def run(model=None, callbacks=(), folder="run", **fields):
        settings = {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "seed": 11,
        }
        arguments = TrainingArguments(output_dir=str(tmp_path / folder), **(settings | fields))
        trainer = Trainer(
            model=model if model is not None else adapted_vit(),
            args=arguments,
            train_dataset=samples,
            callbacks=list(callbacks),
        )
        trainer.train()
        return trainer

    return run


def memory_entries(trainer: Trainer) -> list[dict[str, float]]:
    found = [{k: v for k, v in entry.items() if k.startswith("memory_")} for entry in trainer.state.log_history]
    return [entry for entry in found if entry]


def test_the_numbers(train, samples):
    trainer = train(callbacks=[MemoryReportCallback()])
    (entry,) = memory_entries(trainer)
    model = trainer.model
    batch = {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples[:4]]),
        "labels": torch.tensor([sample["labels"] for sample in samples[:4]]),
    }
    assert entry["memory_kept_mb"] == pytest.approx(saved_activation_bytes(model, batch) / 1e6, abs=1e-3)
    loaded = [*model.parameters(), *model.buffers(), *batch.values()]
    total = sum(t.nbytes for t in loaded) + optimizer_state_bytes(trainer.optimizer) + peak_step_bytes(model, batch)
    assert entry["memory_peak_measured_mb"] == pytest.approx(total / 1e6, rel=0.02)
    assert entry["memory_peak_predicted_mb"] == pytest.approx(entry["memory_peak_measured_mb"], rel=0.05)
    operators = {
        key: value for key, value in entry.items() if key.startswith("memory_kept_") and key != "memory_kept_mb"
    }
    assert sum(operators.values()) == pytest.approx(entry["memory_kept_mb"], abs=0.01)
    assert "memory_kept_norm_mb" in operators


def test_it_is_in_the_saved_state_and_on_the_screen(train, capsys):
    trainer = train(callbacks=[MemoryReportCallback()], save_strategy="steps", save_steps=4, logging_steps=2)
    state = json.loads((Path(trainer.args.output_dir) / "checkpoint-4" / "trainer_state.json").read_text())
    entries = [entry for entry in state["log_history"] if "memory_kept_mb" in entry]
    assert [entry["step"] for entry in entries] == [2]
    train(callbacks=[MemoryReportCallback()], disable_tqdm=False, folder="bar")
    captured = capsys.readouterr()
    assert "memory_peak_predicted_mb" in captured.out + captured.err


def test_training_is_bit_identical_with_and_without(train):
    plain, reported = train(folder="plain"), train(callbacks=[MemoryReportCallback()], folder="reported")
    states = [dict(trainer.model.named_parameters()) for trainer in (plain, reported)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    losses = [[e["loss"] for e in trainer.state.log_history if "loss" in e] for trainer in (plain, reported)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_it_measures_once(train, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "peft_s2a.integrations.memory_report.peak_step_bytes", lambda *a: calls.append(1) or peak_step_bytes(*a)
    )
    callback = MemoryReportCallback()
    trainer = train(callbacks=[callback], max_steps=6)
    assert calls == [1]
    assert len(memory_entries(trainer)) == 1
    assert callback._batch is None
    assert not trainer.model._forward_pre_hooks


def test_gradient_accumulation_measures_one_forward(train):
    (entry,) = memory_entries(train(callbacks=[MemoryReportCallback()], gradient_accumulation_steps=2, folder="twice"))
    (once,) = memory_entries(train(callbacks=[MemoryReportCallback()], folder="once"))
    assert entry["memory_kept_mb"] == once["memory_kept_mb"]


def test_a_model_that_needs_data_is_measured_alone(train):
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3 * 32 * 32, 3)

        def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            x = pixel_values.flatten(1)
            logits = self.layer(x if float(x.sum()) > 1e9 else -x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    with pytest.warns(UserWarning, match="The peak is not predicted: .*Looks cannot be simulated"):
        (entry,) = memory_entries(train(model=Looks(), callbacks=[MemoryReportCallback()]))
    assert "memory_peak_predicted_mb" not in entry
    assert entry["memory_peak_measured_mb"] > 0


def test_importing_does_not_load_the_trainer():
    code = "import sys, peft_s2a; sys.exit('transformers.trainer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
