"""Stock `transformers.Trainer`: nothing but the configuration tells it of S2A."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as T
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from peft_s2a import S2AConfig

from .conftest import make_adapted_vit


@pytest.fixture
def make_trainer(adapted_vit, samples, tmp_path):
    def make(model=None, folder="run", callbacks=None, **fields):
        settings = {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_steps": 2,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "seed": 11,
        }
        arguments = TrainingArguments(output_dir=str(tmp_path / folder), **(settings | fields))
        return Trainer(
            model=model if model is not None else adapted_vit(),
            args=arguments,
            train_dataset=samples,
            eval_dataset=samples[:9],
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
            callbacks=callbacks,
        )

    return make


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_training_evaluation_and_checkpoints(make_trainer):
    trainer = make_trainer()
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad or "k_proj" in name, name  # a shift of the keys changes nothing
    evaluations = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(evaluations) == 3
    checkpoints = sorted(Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for path in checkpoints:
        assert not [*path.glob("model*"), *path.glob("pytorch_model*")]
        tensors = load_file(path / "adapter_model.safetensors")
        assert sum(t.numel() for t in tensors.values()) == trainer.model.get_nb_trainable_parameters()[0]
        assert all(".s2a_" in key or ".classifier." in key for key in tensors)


def adapted_resnet(**fields) -> PeftModel:
    """A model with batch norms."""
    torch.manual_seed(0)
    base = T.ResNetForImageClassification(
        T.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=3)
    )
    return get_peft_model(base, S2AConfig(modules_to_save=["classifier"], **fields))


RESUMED = {
    "dropout": lambda: make_adapted_vit(),
    "stochastic rounding": lambda: make_adapted_vit(activation_rounding="stochastic"),
    "blocks run again": lambda: make_adapted_vit(activation_policy="recompute"),
    "batch norms, frozen": lambda: adapted_resnet(),
    "batch norms, trained": lambda: adapted_resnet(train_batch_norm=True),
}


@pytest.mark.parametrize("name", list(RESUMED))
def test_resuming_is_bit_identical(make_trainer, name):
    make = RESUMED[name]
    fields = {"lr_scheduler_type": "constant", "save_strategy": "no"}
    whole = make_trainer(make(), folder="whole", **fields)
    whole.train()
    part = make_trainer(make(), folder="part", max_steps=4, **fields | {"save_strategy": "steps", "save_steps": 4})
    part.train()  # an evaluation lies before its checkpoint, and one behind
    resumed = make_trainer(make(), folder="part", **fields)
    resumed.train(resume_from_checkpoint=str(Path(part.args.output_dir) / "checkpoint-4"))
    assert resumed.state.global_step == 6
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    states = [get_peft_model_state_dict(trainer.model) for trainer in (whole, resumed)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    start = get_peft_model_state_dict(make())
    assert any(not torch.equal(value, start[name]) for name, value in states[0].items())
    if name == "batch norms, trained":
        assert any("running_mean" in key and not torch.equal(value, start[key]) for key, value in states[0].items())


def test_the_best_model_is_loaded_at_the_end(make_trainer, samples):
    # the loss falls; counted as the larger the better, the best is not the last
    trainer = make_trainer(load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)
    trainer.train()
    evaluations = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = max(evaluations, key=evaluations.__getitem__)
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    assert best != 6
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[best], rel=1e-5)
    saved = load_file(Path(trainer.state.best_model_checkpoint) / "adapter_model.safetensors")
    state = {name.replace(".default", ""): value for name, value in adapter_state(trainer.model).items()}
    state = {name.replace(".modules_to_save", ""): value for name, value in state.items()}
    torch.testing.assert_close(state, saved, rtol=0, atol=0)


def test_gradient_accumulation_is_a_larger_batch(make_trainer, adapted_vit):
    fields = {
        "max_steps": 2,
        "eval_strategy": "no",
        "save_strategy": "no",
        "optim": "sgd",
        "max_grad_norm": 0.0,
    }
    states = []
    for batch, steps in ((8, 1), (4, 2)):
        model = adapted_vit(activation_bits=None)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = make_trainer(
            model, f"batch{batch}", per_device_train_batch_size=batch, gradient_accumulation_steps=steps, **fields
        )
        trainer.train()
        states.append(adapter_state(trainer.model))
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"label_smoothing_factor": 0.1},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
    ],
    ids=["label smoothing", "checkpointing", "reentrant checkpointing", "bf16", "accumulation"],
)
def test_the_loss_falls(make_trainer, fields):
    trainer = make_trainer(max_steps=12, eval_strategy="no", save_strategy="no", **fields)
    trainer.train()
    assert sum(losses(trainer)[-3:]) < sum(losses(trainer)[:3])
    assert all(p.grad is None or p.requires_grad for p in trainer.model.parameters())


def test_early_stopping(make_trainer):
    trainer = make_trainer(
        learning_rate=0.0,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
    )
    trainer.train()
    assert trainer.state.global_step == 4


def test_checkpoints_are_adapters(make_trainer, adapted_vit, samples):
    trainer = make_trainer()
    trainer.train()
    base = adapted_vit().unload()
    folder = Path(trainer.args.output_dir) / "checkpoint-6"
    loaded = PeftModel.from_pretrained(base, folder).eval()
    images = torch.stack([sample["pixel_values"] for sample in samples])
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, trainer.model.eval()(images).logits)


def test_bits_are_calibrated_by_the_first_step(adapted_vit, make_trainer):
    config = {"activation_bits": "auto", "activation_groups": "instance", "activation_target_bits": 3.5}
    trainer = make_trainer(adapted_vit(**config), folder="lazy")
    trainer.train()
    allocation = trainer.model.peft_config["default"].activation_allocation
    assert allocation["groups"]
    # the same training with the bits known from the start: calibrating has not disturbed it
    known = make_trainer(adapted_vit(**config, activation_allocation=allocation), folder="known")
    known.train()
    assert losses(known) == losses(trainer)
    torch.testing.assert_close(adapter_state(known.model), adapter_state(trainer.model), rtol=0, atol=0)
    saved = Path(trainer.args.output_dir) / "checkpoint-6" / "adapter_config.json"
    assert json.loads(saved.read_text())["activation_allocation"] == allocation


def test_batches_of_similar_lengths(make_trainer):
    """Sequences of many lengths, grouped by length and padded by the collator: bias deltas need no fixed length."""
    generator = torch.Generator().manual_seed(2)
    samples = [
        {"input_ids": torch.randint(1, 40, (4 + index % 9,), generator=generator), "labels": index % 2}
        for index in range(96)
    ]
    for sample in samples:
        sample["input_ids"][0] = 41 + sample["labels"]
    shapes = []

    def collate(items):
        ids = torch.nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
        shapes.append((ids.shape[1], min(len(item["input_ids"]) for item in items)))
        labels = torch.tensor([item["labels"] for item in items])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    bert = T.BertForSequenceClassification(T.BertConfig(**sizes, vocab_size=50, max_position_embeddings=16))
    config = S2AConfig(modules_to_save=["classifier"], prompt_rank=0, side_reduction=0)
    trainer = make_trainer(
        get_peft_model(bert, config),
        max_steps=18,
        eval_strategy="no",
        save_strategy="no",
        train_sampling_strategy="group_by_length",
    )
    trainer.train_dataset, trainer.data_collator = samples, collate
    trainer.train()
    assert len({longest for longest, _ in shapes}) > 2
    assert sum(longest - shortest for longest, shortest in shapes) / len(shapes) < 4  # of 8 at random
    assert sum(losses(trainer)[-3:]) < sum(losses(trainer)[:3])
