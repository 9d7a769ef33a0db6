"""One training run of a method on a task, and what a step of it costs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup, set_seed

from benchmarks.image_task import Task
from benchmarks.memory import check_gradients, logits
from benchmarks.methods import ADAPTERS, apply
from benchmarks.models import BenchmarkModel
from benchmarks.results import Record
from benchmarks.transfer_plan import Variant
from peft_s2a.memory import peak_step_bytes, saved_activation_bytes

from methods import head_names  # isort: skip  # of the examples, whose folder `benchmarks.image_task` puts on the path


def build(task: Task, variant: Variant, seed: int, device: torch.device) -> tuple[nn.Module, list[str]]:
    """A fresh model made ready for the variant, and the paths of its head; the seed sets both head and adapter.

    Raises:
        NotApplicableError: if the method does not exist for the model.
    """
    set_seed(seed)
    base = task.load_model().to(device)
    heads = head_names(base)
    sized = {"image_size": task.image_size} if variant.method == "s2a" else {}
    return apply(variant.method, BenchmarkModel(base, heads, True), sized | variant.config).to(device), heads


def make_optimizer(model: nn.Module, variant: Variant, rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay; for LoRA-FA PEFT's own, which is AdamW on a projected gradient."""
    if variant.method == "lora_fa":
        assert isinstance(model, PeftModel)
        config: Any = model.peft_config["default"]
        return create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=rate)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)


def set_training(model: nn.Module, variant: Variant) -> None:
    """Train mode; running statistics of batch norms move in full fine-tuning alone.

    An adapter is saved without them, so that one trained with moving ones would give other outputs when loaded.
    S2A sees to its batch norms itself, as its configuration says.
    """
    model.train()
    if variant.method not in ("full", "s2a"):
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def fine_tune(
    task: Task,
    train: Any,
    test: Any,
    variant: Variant,
    rate: float,
    seed: int,
    epochs: float,
    batch: int,
    device: torch.device,
    progress: Callable[[float], None] = lambda share: None,
) -> Record:
    """Trains a fresh model on `train` and evaluates it once, on `test`: 10 % linear warm-up, linear decay.

    Args:
        task: gives the model.
        train, test: data sets of (pixels, label).
        progress: is called with the share of steps that are done.

    Returns:
        `"accuracy"`, `"loss"` (mean cross-entropy on `test`), `"train_loss"` (mean over the last epoch's steps),
        `"seconds"` of training by the clock and `"cpu_seconds"` of all threads, which other processes disturb less.
    """
    model, _ = build(task, variant, seed, device)
    loader = DataLoader(train, batch, shuffle=True, generator=torch.Generator().manual_seed(seed))
    optimizer = make_optimizer(model, variant, rate)
    steps = max(round(epochs * len(loader)), 1)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    set_training(model, variant)
    losses: list[float] = []
    began, began_cpu = time.perf_counter(), time.process_time()
    while len(losses) < steps:
        for pixels, labels in loader:
            loss = model(pixel_values=pixels.to(device), labels=labels.to(device)).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress(len(losses) / steps)
            if len(losses) == steps:
                break
    seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - began_cpu}
    last = losses[-len(loader) :]
    outcome = {**evaluate(model, test, device), "train_loss": sum(last) / len(last), **seconds}
    return {name: round(value, 5) for name, value in outcome.items()}


@torch.no_grad()
def evaluate(model: nn.Module, data: Any, device: torch.device) -> Record:
    """Accuracy and mean cross-entropy."""
    model.eval()
    pairs = [(model(pixel_values=x.to(device)).logits.float(), y.to(device)) for x, y in DataLoader(data, 64)]
    scores, labels = torch.cat([score for score, _ in pairs]), torch.cat([label for _, label in pairs])
    accuracy = (scores.argmax(1) == labels).float().mean().item()
    return {"accuracy": accuracy, "loss": cross_entropy(scores, labels).item()}


def cost(task: Task, variant: Variant, batch: int, device: torch.device) -> Record:
    """Sizes of a variant, and bytes of one training step on `batch` images; measured after the correctness checks.

    Returns:
        `"parameters"` of model and adapter, `"trainable"`, `"trainable_without_head"`, `"adapter_bytes"` (file of what
        was trained, head included), `"kept_bytes"` for backward, `"peak_bytes"` above the loaded model.

    Raises:
        NotApplicableError: if the method does not exist for the model.
        AssertionError: if a fresh adapter's output is not the base model's, or a gradient is not finite.
    """
    pixels, labels = (tensor[:batch].to(device) for tensor in task.train.tensors)
    images = {"pixel_values": pixels, "labels": labels}
    set_seed(0)
    expected = logits(task.load_model().to(device), images) if variant.method in ADAPTERS else None
    model, heads = build(task, variant, 0, device)
    if expected is not None:
        torch.testing.assert_close(logits(model, images), expected, rtol=1e-3, atol=1e-4)
    optimizer = make_optimizer(model, variant, 1e-3)  # LoRA-FA's freezes what it does not train
    check_gradients(model, images)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    head = sum(p.numel() for name, p in trained.items() if in_head(name, heads))
    trainable = sum(parameter.numel() for parameter in trained.values())
    del optimizer
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": trainable,
        "trainable_without_head": trainable - head,
        "adapter_bytes": saved_bytes(model, trained),
        "kept_bytes": saved_activation_bytes(model, images),
        "peak_bytes": peak_step_bytes(model, images),
    }


def in_head(name: str, heads: list[str]) -> bool:
    """Whether a parameter belongs to the head, which every method trains."""
    return "modules_to_save" in name or name.rpartition(".")[0] in heads


def saved_bytes(model: nn.Module, trained: dict[str, Tensor]) -> int:
    """Size of the safetensors file: PEFT's for its models, else one of all trained tensors."""
    if not isinstance(model, PeftModel):
        return len(save({name: tensor.detach().contiguous().cpu() for name, tensor in trained.items()}))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
