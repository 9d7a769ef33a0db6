"""Accuracy, size and memory of S2A and its peers: the same data, schedule and search for each; several seeds.

    python -m benchmarks.transfer                                  # everything, hours on a CPU
    python -m benchmarks.transfer --time_budget 1800               # starts no run after half an hour; call again
    python -m benchmarks.transfer --models efficientnet-lite0 --datasets clip-art --methods full s2a_exact s2a_4
    python -m benchmarks.transfer --models google/vit-base-patch16-224 --datasets cifar100 --image_size 224

For each backbone, data set and method the learning rate is chosen from three on a validation part (20 %) of the
training images, with the first seed; then every seed trains on all training images with it, and the test images are
used once, after the last step. The seed sets the head, the adapter and the order of the images. Bytes are measured once
for each backbone and method. One JSON line a run goes to `results/transfer.jsonl`; what is there is not done again.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.utils.data import Subset

from benchmarks.fine_tuning import cost, fine_tune
from benchmarks.image_task import Task, prepare_task
from benchmarks.methods import NotApplicableError
from benchmarks.results import Record, append, read, versions
from benchmarks.transfer_plan import BACKBONES, DATASETS, SETTING, VARIANTS, Backbone, best_rate, jobs, key

VALIDATION_SHARE = 0.2
RESULT = "transfer"
QUICK = {
    "models": ["efficientnet-lite0"],
    "datasets": ["digits"],
    "methods": ["full", "s2a_exact", "s2a_4"],
    "seeds": [0],
    "epochs": 1.0,
    "max_train_samples": 64,
    "max_test_samples": 64,
}


def settings(options: argparse.Namespace) -> list[Record]:
    """What the runs of each model and data set have in common."""
    found = []
    for model, dataset in product(options.models, options.datasets):
        size = options.image_size or BACKBONES.get(model, Backbone()).image_size
        values = (model, dataset, size, options.epochs, options.batch)
        limits = (options.max_train_samples, options.max_test_samples)
        found.append(dict(zip(SETTING, (*values, *limits), strict=True)))
    return found


def split(task: Task) -> tuple[Subset, Subset]:
    """Training and validation part of the training images, always the same."""
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = round(len(order) * VALIDATION_SHARE)
    return Subset(task.train, order[held_out:]), Subset(task.train, order[:held_out])


def run_job(task: Task, job: Record, device: torch.device, progress: Callable[[float], None]) -> Record:
    """The outcome of one run."""
    train, test = (task.train, task.test) if job["stage"] == "test" else split(task)
    variant, rate, seed = VARIANTS[job["variant"]], job["learning_rate"], job["seed"]
    return fine_tune(task, train, test, variant, rate, seed, job["epochs"], job["batch"], device, progress)


def run_cost(task: Task, job: Record, device: torch.device) -> Record:
    """The outcome of measuring a variant on a model, or why it does not exist there."""
    try:
        return cost(task, VARIANTS[job["variant"]], job["batch"], device)
    except NotApplicableError as error:
        return {"not_applicable": str(error)}


def cost_key(record: Record) -> tuple[object, ...]:
    """What makes two measurements of bytes the same: they do not depend on the data set."""
    return tuple(record[name] for name in ("variant", "model", "image_size", "batch"))


def run(options: argparse.Namespace) -> None:
    """Does the runs that the results do not have yet, until all are there or the time is over."""
    start = time.monotonic()
    device = torch.device(options.device)

    @cache
    def task_of(model: str, dataset: str, image_size: int | None) -> Task:
        limits = (options.max_train_samples, options.max_test_samples)
        return prepare_task(dataset, model, image_size, *limits, options.cache_dir)

    records = list(read(RESULT))
    done = {key(record) for record in records if record["stage"] != "cost"}
    costs = {cost_key(record): record for record in records if record["stage"] == "cost"}
    planned = list(jobs(settings(options), options.methods, options.seeds, options.rates))

    def finish(record: Record) -> None:
        record |= {"device": device.type, "versions": versions()}
        append(RESULT, record)
        records.append(record)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        total = bars.add_task("runs", total=len(planned))
        step = bars.add_task("", total=1)
        for job in planned:
            bars.advance(total)
            if key(job) in done:
                continue
            if options.time_budget is not None and time.monotonic() - start > options.time_budget:
                bars.console.print("time budget used up; call again to go on")
                return
            task = task_of(job["model"], job["dataset"], job["image_size"])
            if cost_key(job) not in costs:
                measured = {**{name: job[name] for name in SETTING}, "stage": "cost", "variant": job["variant"]}
                measured |= run_cost(task, job, device)
                finish(measured)
                costs[cost_key(job)] = measured
            if "not_applicable" in costs[cost_key(job)]:
                continue
            if job["stage"] == "test":
                job["learning_rate"] = best_rate(records, job)
            described = f"{job['model']}, {job['dataset']}, {job['variant']}, {job['stage']} {job['learning_rate']:g}"
            bars.reset(step, description=described, total=1)
            finish(job | run_job(task, job, device, lambda share: bars.update(step, completed=share)))
            gc.collect()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(BACKBONES), help="of the hub, folders, or the default's")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), help="of the hub, folders, or the default's")
    parser.add_argument("--methods", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--image_size", type=int, help="default: 56 (DINOv2), 96 (EfficientNet), else the model's own")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max_train_samples", type=int, default=320, help="0: all")
    parser.add_argument("--max_test_samples", type=int, default=250, help="0: all")
    parser.add_argument("--rates", type=json.loads, default={}, help='JSON, such as {"full": [1e-5, 1e-4]}')
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cache_dir")
    parser.add_argument("--time_budget", type=float, help="seconds after which no run is started")
    parser.add_argument("--quick", action="store_true", help="three methods, one small data set, one epoch")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    for limit in ("max_train_samples", "max_test_samples"):
        setattr(options, limit, getattr(options, limit) or None)
    unknown = set(options.rates) - set(VARIANTS)
    if unknown:
        sys.exit(f"--rates has no method {', '.join(sorted(unknown))}: choose from {', '.join(VARIANTS)}")
    run(options)


if __name__ == "__main__":
    main()
