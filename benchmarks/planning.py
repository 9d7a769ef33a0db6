"""Predicted against measured peaks, and what fits on cards of 8, 12 and 24 GB.

    python -m benchmarks.planning accuracy --models vit_b16 swin_b resnet50 dinov2_l --batch 4
    python -m benchmarks.planning cards

Prints one JSON line a result and appends it to `results/planning.jsonl`. `accuracy` simulates a step of a model without
data, then measures the same step of the real model with the allocator, on the CPU. `cards` only simulates.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
import transformers

from benchmarks.methods import NotApplicableError, apply
from benchmarks.models import BUILDERS, BenchmarkModel, build
from benchmarks.results import append, versions
from peft_s2a import plan
from peft_s2a.memory import peak_step_bytes, simulate_step

METHODS = ("full", "lora_qv", "lora_all", "lora_checkpointing", "s2a")

CARDS = ("8GB", "12GB", "24GB")
BATCH = 32

LARGE: dict[str, Callable[[], Any]] = {
    "ViT-B/16": lambda: transformers.ViTConfig(),
    "ViT-L/16": lambda: transformers.ViTConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "ViT-H/14": lambda: transformers.ViTConfig(
        hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120, patch_size=14
    ),
    "DINOv2-g/14": lambda: transformers.Dinov2Config(
        hidden_size=1536,
        num_hidden_layers=40,
        num_attention_heads=24,
        patch_size=14,
        image_size=224,
        use_swiglu_ffn=True,
    ),
    "Swin-L": lambda: transformers.SwinConfig(embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48]),
    "ResNet-152": lambda: transformers.ResNetConfig(depths=[3, 8, 36, 3]),
}
"""Configurations of models, by the names that the documentation uses."""


def without_data(name: str) -> BenchmarkModel:
    """The model called `name` on the meta device."""
    with torch.device("meta"):
        return BUILDERS[name]()


def accuracy(name: str, method: str, batch_size: int, dtype: torch.dtype) -> None:
    """Writes the predicted and the measured peak of one model and method.

    Raises:
        NotApplicableError: if the method does not exist for the model.
    """
    shape_model = without_data(name)
    shape_model.module.to(dtype)
    batch = shape_model.batch(batch_size, dtype)
    step = simulate_step(apply(method, shape_model), batch)
    base = build(name)
    base.module.to(dtype)
    measured = peak_step_bytes(apply(method, base), batch)
    append(
        "planning",
        {
            "kind": "accuracy",
            "model": name,
            "method": method,
            "bits": 4 if method == "s2a" else None,
            "config": {},
            "batch": batch_size,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "predicted_mb": round(step.step_peak / 1e6, 2),
            "measured_mb": round(measured / 1e6, 2),
            "versions": versions(),
        },
    )


def cards(name: str, dtype: str) -> None:
    """Writes the largest batches of one model on every card."""
    found = plan(LARGE[name](), batch_size=BATCH, budget=CARDS[-1], dtype=dtype)
    for card in CARDS:
        record = {"kind": "card", "model": name, "card": card, "dtype": dtype}
        append("planning", record | {"plan": found.with_budget(card).as_dict(), "versions": versions()})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["accuracy", "cards"])
    parser.add_argument("--models", nargs="+", help="default: all of the kind")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    if arguments.kind == "cards":
        for name in arguments.models or LARGE:
            cards(name, arguments.dtype)
        return
    for name in arguments.models or ("vit_b16", "swin_b", "resnet50", "dinov2_l"):
        for method in arguments.methods:
            try:
                accuracy(name, method, arguments.batch, getattr(torch, arguments.dtype))
            except NotApplicableError as error:
                print(f"{name}, {method}: {error}")
            gc.collect()


if __name__ == "__main__":
    main()
