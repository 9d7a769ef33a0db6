"""Accuracy of S2A beside full fine-tuning, LoRA and a linear probe: several seeds, JSON lines, resumable.

    python benchmarks/accuracy.py --datasets digits clip-art --seeds 0 1 2 --output outputs/accuracy.jsonl
    python benchmarks/accuracy.py --time_budget 1800    # stops starting runs after half an hour; call again to go on
    python benchmarks/accuracy.py --summary             # only prints what the file says

For each data set and method the learning rate is chosen on a validation part (20 %) of the training images, with seed
0; then every seed trains on all training images with it and the test images are used once. The seed sets the head's
start and the order of the images. Images are decoded and resized once. The summary answers two questions: is S2A at
4 bits worse than S2A with exact activations by more than the spread between seeds, and what share of the accuracy of
full fine-tuning does it reach.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset, TensorDataset
from transformers import AutoImageProcessor, Trainer, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from arguments import DataTrainingArguments, ExampleTrainingArguments, ModelArguments
from image_classification import model_loader, prepare_data
from methods import MethodOptions, apply_method
from metrics import compute_metrics
from pretrained import resolve_model
from transforms import batch_transform, collate

Record = dict[str, Any]
VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class Variant:
    """A method, the bits of its activations and the learning rates it may choose from."""

    method: str
    activation_bits: int | None
    learning_rates: tuple[float, ...]


VARIANTS = {
    "full": Variant("full", None, (1e-5, 2e-5, 5e-5)),
    "s2a-exact": Variant("s2a", None, (5e-4, 1e-3, 2e-3)),
    "s2a-4bit": Variant("s2a", 4, (5e-4, 1e-3, 2e-3)),
    "lora": Variant("lora", None, (3e-4, 1e-3, 3e-3)),
    "linear_probe": Variant("linear_probe", None, (3e-3, 1e-2, 3e-2)),
}


@dataclass(frozen=True)
class Task:
    """A data set as tensors, and the model to fine-tune on it."""

    train: TensorDataset
    test: TensorDataset
    load_model: Callable[[], Any]
    image_size: int


def prepare_task(dataset: str, options: argparse.Namespace) -> Task:
    """Decode and resize all images of `dataset` once."""
    path = resolve_model(options.model, options.cache_dir)
    limits = {"max_train_samples": options.max_train_samples, "max_eval_samples": options.max_test_samples}
    parts = prepare_data(DataTrainingArguments(dataset=dataset, **limits), options.cache_dir, seed=0)
    transform = batch_transform(AutoImageProcessor.from_pretrained(path), options.image_size)
    tensors = {}
    for split, part in parts.items():
        batch = collate(list(part.with_transform(transform)))
        tensors[split] = TensorDataset(batch["pixel_values"], batch["labels"])
    classes = parts["train"].features["label"].names
    return Task(tensors["train"], tensors["test"], model_loader(path, ModelArguments(), classes), options.image_size)


def fine_tune(task: Task, train: Any, test: Any, variant: Variant, rate: float, seed: int, epochs: float) -> float:
    """Train a fresh model on `train` and return its accuracy on `test`."""
    set_seed(seed)
    options = MethodOptions(activation_bits=variant.activation_bits, image_size=task.image_size)
    model = apply_method(task.load_model(), variant.method, options)
    with tempfile.TemporaryDirectory() as folder:
        arguments = ExampleTrainingArguments(
            output_dir=folder,
            learning_rate=rate,
            num_train_epochs=epochs,
            seed=seed,
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=test,
            data_collator=_collate_pairs,
            compute_metrics=compute_metrics,
        )
        trainer.train()
        return float(trainer.evaluate()["eval_accuracy"])


def _collate_pairs(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    pixels, labels = zip(*pairs, strict=True)
    return {"pixel_values": torch.stack(pixels), "labels": torch.stack(labels)}


def run(options: argparse.Namespace) -> None:
    """Do the runs that the output file does not have yet, until all are there or the time is over."""
    start = time.monotonic()
    for dataset in options.datasets:
        task: Task | None = None
        for job in plan(dataset, options):
            if options.time_budget is not None and time.monotonic() - start > options.time_budget:
                print("time budget used up; call again to go on")
                return
            records = read(options.output)
            if any(key(record) == key(job) for record in records):
                continue
            if job["stage"] == "test":
                job["learning_rate"] = best_rate(records, job)
            task = task or prepare_task(dataset, options)
            began = time.monotonic()
            job["accuracy"] = _run_job(task, job, options)
            job |= {"seconds": round(time.monotonic() - began, 1), "torch": torch.__version__}
            options.output.parent.mkdir(parents=True, exist_ok=True)
            with options.output.open("a") as file:
                file.write(json.dumps(job) + "\n")
            print(json.dumps(job), flush=True)


def plan(dataset: str, options: argparse.Namespace) -> Iterable[Record]:
    """All runs of one data set: first the learning rates on the validation part, then the seeds."""
    setting = {
        "dataset": dataset,
        "model": options.model,
        "image_size": options.image_size,
        "epochs": options.epochs,
        "max_train_samples": options.max_train_samples,
        "max_test_samples": options.max_test_samples,
    }
    for name in options.methods:
        for rate in VARIANTS[name].learning_rates:
            yield {**setting, "stage": "validation", "variant": name, "seed": 0, "learning_rate": rate}
    for seed in options.seeds:  # seeds outside, so that an interrupted benchmark still compares the methods
        for name in options.methods:
            yield {**setting, "stage": "test", "variant": name, "seed": seed}


def _run_job(task: Task, job: Record, options: argparse.Namespace) -> float:
    variant, rate, seed = VARIANTS[job["variant"]], job["learning_rate"], job["seed"]
    if job["stage"] == "test":
        return fine_tune(task, task.train, task.test, variant, rate, seed, options.epochs)
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = round(len(order) * VALIDATION_SHARE)
    train, validation = Subset(task.train, order[held_out:]), Subset(task.train, order[:held_out])
    return fine_tune(task, train, validation, variant, rate, seed, options.epochs)


def key(record: Record) -> tuple[Any, ...]:
    """What makes two records the same run; a test run is the same whatever learning rate was chosen for it."""
    names = ["dataset", "model", "image_size", "epochs", "max_train_samples", "max_test_samples", "stage", "variant"]
    rate = record["learning_rate"] if record["stage"] == "validation" else None
    return (*(record[name] for name in names), record["seed"], rate)


def best_rate(records: list[Record], job: Record) -> float:
    """The learning rate with the best validation accuracy for the setting of `job`; the smaller one of a tie."""
    wanted = {**job, "stage": "validation", "seed": 0}
    found = [record for record in records if key({**wanted, "learning_rate": record["learning_rate"]}) == key(record)]
    return float(max(found, key=lambda record: (record["accuracy"], -record["learning_rate"]))["learning_rate"])


def read(path: Path) -> list[Record]:
    """The records of a JSON-lines file; none when it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summarise(records: list[Record]) -> None:
    """Print mean and spread of every method, and the two comparisons, for every setting."""
    groups: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for record in records:
        if record["stage"] == "test":
            groups.setdefault(key(record)[:6], {}).setdefault(record["variant"], []).append(record["accuracy"])
    for setting, by_variant in groups.items():
        print(f"\n{setting[0]}, {setting[1]}, {setting[2]} px, {setting[3]} epochs")
        for name, values in by_variant.items():
            print(f"  {name:13} {statistics.mean(values):.4f} +- {spread(values):.4f} ({len(values)} seeds)")
        if {"s2a-4bit", "s2a-exact"} <= by_variant.keys():
            four, exact = by_variant["s2a-4bit"], by_variant["s2a-exact"]
            loss, noise = statistics.mean(exact) - statistics.mean(four), max(spread(four), spread(exact))
            verdict = "within" if loss <= noise else "beyond"
            print(f"  4 bits lose {loss:+.4f} against exact: {verdict} the spread between seeds ({noise:.4f})")
        if {"s2a-4bit", "full"} <= by_variant.keys():
            share = statistics.mean(by_variant["s2a-4bit"]) / statistics.mean(by_variant["full"])
            print(f"  S2A at 4 bits reaches {share:.2%} of full fine-tuning (the paper says 98.7 %)")


def spread(values: list[float]) -> float:
    """Standard deviation between seeds; 0 for a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    """Run what is missing, then print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=["digits", "clip-art"])
    parser.add_argument("--methods", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="dinov2-small-saliency")
    parser.add_argument("--image_size", type=int, default=112)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--max_test_samples", type=int)
    parser.add_argument("--cache_dir")
    parser.add_argument("--output", type=Path, default=Path("outputs/accuracy.jsonl"))
    parser.add_argument("--time_budget", type=float, help="seconds after which no run is started")
    parser.add_argument("--summary", action="store_true", help="only print what the output file says")
    options = parser.parse_args()
    if not options.summary:
        run(options)
    summarise(read(options.output))


if __name__ == "__main__":
    main()
