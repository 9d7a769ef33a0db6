"""Training curves with codes and with exact activations, over several seeds: does coding change how training goes?

    python -m benchmarks.curves                                             # both pretrained backbones
    python -m benchmarks.curves --backbones efficientnet-lite0 --seeds 0 1  # some of it
    python -m benchmarks.curves --summary                                   # only prints what was found

The seed sets head, order of the images and whatever else is random; a run with codes and one with exact activations of
the same seed differ in nothing else. AdamW, 10 % linear warm-up, then linear decay. The held-out images choose nothing.
One JSON line an epoch goes to `results/curves.jsonl` when the run is complete; runs that are there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import get_linear_schedule_with_warmup, set_seed

from benchmarks.image_task import Task, prepare_task
from benchmarks.results import Record, append, read, versions
from benchmarks.summaries import CURVES, comparison, curves
from peft_s2a import S2AConfig

from methods import head_names  # isort: skip  # of the examples, whose folder `benchmarks.image_task` puts on the path

BACKBONES: dict[str, dict[str, Any]] = {
    "dinov2-small-saliency": {"image_size": 56, "config": {}},
    "efficientnet-lite0": {"image_size": 96, "config": {"train_batch_norm": True}},
}
"""Size of the images, and fields of `S2AConfig` that both variants share. Batch norms run by the batch's statistics:
by running ones nothing but the side branches would be coded on this backbone."""

_ALLOCATED = {"activation_bits": "auto", "activation_target_bits": 2.5, "activation_groups": "instance"}

VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {"activation_bits": None},
    "4 bits": {"activation_bits": 4},
    "2.5 bits on average": _ALLOCATED,
    "2.5 bits, rebuilt where it pays": _ALLOCATED | {"activation_policy": "auto"},
}
"""Fields of `S2AConfig` by name; calibrated is in the first step of a run."""

DEFAULT_VARIANTS = {"dinov2-small-saliency": list(VARIANTS), "efficientnet-lite0": ["exact", "4 bits"]}


@torch.no_grad()
def evaluate(model: Any, data: TensorDataset) -> dict[str, float]:
    """Mean loss and accuracy on the held-out images."""
    model.eval()
    scores = torch.cat([model(pixel_values=pixels).logits for pixels, _ in DataLoader(data, batch_size=32)])
    labels = data.tensors[1]
    return {
        "test_loss": cross_entropy(scores, labels).item(),
        "test_accuracy": (scores.argmax(1) == labels).float().mean().item(),
    }


def train(task: Task, config: dict[str, Any], seed: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """One run: for each epoch the mean training loss, the loss and the accuracy on the held-out images."""
    set_seed(seed)
    base = task.load_model()
    model = get_peft_model(base, S2AConfig(modules_to_save=head_names(base), image_size=task.image_size, **config))
    loader = DataLoader(task.train, options.batch, shuffle=True, generator=torch.Generator().manual_seed(seed))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate)
    steps = options.epochs * len(loader)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    epochs = []
    for _ in range(options.epochs):
        model.train()
        losses = []
        for pixels, labels in loader:
            loss = model(pixel_values=pixels, labels=labels).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item() * len(labels))
        epochs.append({"train_loss": sum(losses) / len(task.train), **evaluate(model, task.test)})
    return epochs


def key(record: Record) -> tuple[Any, ...]:
    """What makes two records the same run."""
    names = ("backbone", "dataset", "image_size", "epochs", "batch", "learning_rate", "max_train_samples", "seed")
    return (*(record[name] for name in names), record["variant"], json.dumps(record["config"], sort_keys=True))


def run(options: argparse.Namespace) -> None:
    """Does the runs that are not in the results yet."""
    start = time.monotonic()
    done = {key(record) for record in read("curves")}
    for name in options.backbones:
        setting = BACKBONES[name]
        task: Task | None = None
        for seed in options.seeds:  # seeds outside, so that what was interrupted still compares the variants
            for variant in options.variants or DEFAULT_VARIANTS[name]:
                job = {
                    "backbone": name,
                    "dataset": options.dataset,
                    "image_size": options.image_size or setting["image_size"],
                    "config": setting["config"],
                    "epochs": options.epochs,
                    "batch": options.batch,
                    "learning_rate": options.learning_rate,
                    "max_train_samples": options.max_train_samples,
                    "seed": seed,
                    "variant": variant,
                }
                if key(job) in done:
                    continue
                if options.time_budget is not None and time.monotonic() - start > options.time_budget:
                    print("time budget used up; call again to go on")
                    return
                if task is None:
                    limit, cache = options.max_train_samples, options.cache_dir
                    task = prepare_task(options.dataset, name, job["image_size"], limit, cache=cache)
                config = {**setting["config"], **VARIANTS[variant]}
                for epoch, values in enumerate(train(task, config, seed, options), start=1):
                    rounded = {name: round(value, 5) for name, value in values.items()}
                    append("curves", {**job, "epoch": epoch, **rounded, "versions": versions()})


def summarise() -> None:
    """Prints every comparison."""
    for name in CURVES:
        for backbone, variants in curves(name).items():
            for variant in variants:
                if variant != "exact" and len(variants[variant][-1]) == len(variants["exact"][-1]):
                    found = comparison(name, backbone, variant)
                    numbers = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
                    print(f"{backbone}, {name}, {variant}: {numbers}")


def main() -> None:
    """Runs what is missing, then prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=list(BACKBONES))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="default: those of the backbone")
    parser.add_argument("--dataset", default="clip-art")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--image_size", type=int, help="default: 56 (DINOv2), 96 (EfficientNet)")
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--cache_dir")
    parser.add_argument("--time_budget", type=float, help="seconds after which no run is started")
    parser.add_argument("--summary", action="store_true", help="only print what the results say")
    options = parser.parse_args()
    if not options.summary:
        run(options)
    summarise()


if __name__ == "__main__":
    main()
