"""Time of a training step, methods interleaved, as a ratio to bias tuning in stock torch.

    python -m benchmarks.step_time --model vit_b16 --batch 8 --rounds 5

Every round runs one step (forward, backward) of each method in turn, so that a machine whose speed drifts does so for
all of them; the ratio is taken round by round and its median is reported. One JSON line a method goes to
`benchmarks/results/step_time.jsonl`.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from benchmarks.methods import apply
from benchmarks.models import build
from benchmarks.results import append, versions
from peft_s2a.memory.running import Batch, call_model, training_loss

METHODS = {
    "bias_only": ("bias_only", {}),
    "s2a": ("s2a", {"activation_bits": 4}),
    "s2a exact": ("s2a", {"activation_bits": None}),
    "lora_qv": ("lora_qv", {}),
    "lora_checkpointing": ("lora_checkpointing", {}),
    "full": ("full", {}),
}


def step(model: nn.Module, batch: Batch) -> float:
    """Seconds of one forward and backward."""
    model.zero_grad()
    start = time.perf_counter()
    training_loss(call_model(model, batch)).backward()
    return time.perf_counter() - start


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_b16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    models = {}
    for name, (method, config) in METHODS.items():
        base = build(options.model)
        models[name] = apply(method, base, dict(config)).train()
        batch = base.batch(options.batch)
        step(models[name], batch)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.rounds):
        for name, model in models.items():
            seconds[name].append(step(model, batch))
    for name, times in seconds.items():
        ratios = [own / stock for own, stock in zip(times, seconds["bias_only"], strict=True)]
        record = {
            "model": options.model,
            "method": name,
            "batch": options.batch,
            "seconds": round(statistics.median(times), 3),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "threads": torch.get_num_threads(),
            "device": "cpu",
            "versions": versions(),
        }
        append("step_time", record)


if __name__ == "__main__":
    main()
